// Command platter creates, inspects, copies and serves virtual disks. See package internal/cli.
package main

import (
	"os"

	"github.com/platter-disk/platter/internal/cli"
)

func main() {
	os.Exit(cli.Main(os.Args[1:]))
}
