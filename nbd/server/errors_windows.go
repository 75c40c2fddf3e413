package server

import "golang.org/x/sys/windows"

// Local errors that the protocol has a value of its own for.
var (
	noSpace      = [...]error{windows.ERROR_DISK_FULL, windows.ERROR_HANDLE_DISK_FULL, windows.ERROR_FILE_TOO_LARGE}
	noPermission = [...]error{windows.ERROR_ACCESS_DENIED, windows.ERROR_WRITE_PROTECT}
)
