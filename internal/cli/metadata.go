package cli

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
)

// metadataFlags say how the metadata of images becomes durable.
type metadataFlags struct {
	discipline string
	checksums  bool
}

func (f *metadataFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.discipline, "discipline", "", "`NAME` says how metadata becomes durable: "+strings.Join(qcow2.Disciplines(), ", ")+"\n"+
		"for qcow2, immediate or buffered for fvd (default: what the image asks for)")
	completeWith(cmd, "discipline", image.Disciplines()...)
	fs.BoolVar(&f.checksums, "journal-data-checksums", false, "with the discipline journal: checksums of new data in place of a barrier;\na crashed image then needs a program that knows them")
}

// apply sets what of the flags concerns opening.
func (f *metadataFlags) apply(o image.Options) image.Options {
	o.Discipline, o.JournalDataChecksums = f.discipline, f.checksums
	return o
}

// arguments are the flags as they were given.
func (f *metadataFlags) arguments() []string {
	var args []string
	if f.discipline != "" {
		args = append(args, "--discipline", f.discipline)
	}
	if f.checksums {
		args = append(args, "--journal-data-checksums")
	}
	return args
}
