package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// parameter is one name=value of an option list.
type parameter struct{ name, value string }

// optionsFlag is the flag -o, which may be repeated.
type optionsFlag struct{ lists []string }

func (f *optionsFlag) register(cmd *cobra.Command, usage string) {
	cmd.Flags().StringArrayVarP(&f.lists, "options", "o", nil, usage)
}

// read returns the parameters, once the flags in open are known to be right, too. Who asks for help gets it however
// the rest of the command line looks.
func (f *optionsFlag) read(cmd *cobra.Command, open *openFlags) (params []parameter, help bool, err error) {
	if params, help, err = parseOptionLists(f.lists); help || err != nil {
		return nil, help, err
	}
	return params, false, open.check(cmd)
}

// parseOptionLists reads the values of repeated -o options: name=value parts between commas, where a doubled
// comma stands for one. A part without "=" is a switch that is on. help tells that a part asked for help.
func parseOptionLists(lists []string) (params []parameter, help bool, err error) {
	for _, list := range lists {
		parts := splitCommas(list)
		if len(parts) == 0 {
			return nil, false, fmt.Errorf("Invalid option list: %s", list)
		}
		for _, part := range parts {
			name, value, ok := strings.Cut(part, "=")
			switch {
			case name == "" || (ok && strings.ContainsAny(name, " \t")):
				return nil, false, fmt.Errorf("Invalid option list: %s", list)
			case !ok && (name == "help" || name == "?"):
				return nil, true, nil
			case !ok:
				value = "on"
			}
			params = append(params, parameter{name, value})
		}
	}
	return params, false, nil
}

// splitCommas splits at single commas and turns doubled ones into one.
func splitCommas(s string) []string {
	if s == "" {
		return nil
	}
	var parts []string
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != ',':
			b.WriteByte(s[i])
		case i+1 < len(s) && s[i+1] == ',':
			b.WriteByte(',')
			i++
		default:
			parts = append(parts, b.String())
			b.Reset()
		}
	}
	return append(parts, b.String())
}

// quoteCommas is the reverse of what splitCommas does to a value.
func quoteCommas(s string) string { return strings.ReplaceAll(s, ",", ",,") }
