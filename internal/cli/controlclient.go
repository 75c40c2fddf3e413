package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"
)

const (
	maxControlReply = 4 << 20          // bytes: a status of thousands of exports
	controlTimeout  = 60 * time.Second // for an answer: a base image that hangs may delay it
)

// controlClient asks the server behind a control socket (controller).
type controlClient struct {
	socket string
	http   *http.Client
}

func newControlClient(socket string) *controlClient {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	return &controlClient{socket, &http.Client{
		Timeout:   controlTimeout,
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true},
	}}
}

// do sends a request about one export, or about all of them, and decodes the answer.
func (c *controlClient) do(ctx context.Context, method, path, export string, one bool, reply any) error {
	if one {
		path += "?" + url.Values{"export": {export}}.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://control"+path, nil)
	if err != nil {
		return err
	}
	res, err := c.http.Do(req)
	if err != nil {
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		return fmt.Errorf("control socket '%s': %w", c.socket, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxControlReply+1))
	if err == nil {
		err = decodeControlReply(res.StatusCode, body, reply)
	}
	if err != nil {
		return fmt.Errorf("control socket '%s': %w", c.socket, err)
	}
	return nil
}

// decodeControlReply reads an answer into reply. What the server refused is an error in its words.
func decodeControlReply(status int, body []byte, reply any) error {
	if len(body) > maxControlReply {
		return fmt.Errorf("the answer has more than %d bytes", maxControlReply)
	}
	if status >= 400 {
		var refused struct {
			Error string `json:"error"`
		}
		if json.Unmarshal(body, &refused) != nil || refused.Error == "" {
			return fmt.Errorf("the answer is status %d, and nothing that platter serve says: %.80q", status, body)
		}
		return errors.New(printableText(refused.Error))
	}
	if err := json.Unmarshal(body, reply); err != nil {
		return fmt.Errorf("the answer is nothing that platter serve says: %w", err)
	}
	return nil
}

// printableText is what another process said, fit for a terminal.
func printableText(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
