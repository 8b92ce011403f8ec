package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// patience is how long a client waits for the whole of an answer. The slowest honest one, 256 MiB to
// each of 32 clients, takes some seconds.
const patience = time.Minute

// request is a whole request, written once and sent as often as wanted.
func request(method, path string) []byte {
	return fmt.Appendf(nil, "%s /v2/%s/%s HTTP/1.1\r\nHost: localhost\r\nAccept: %s, %s, */*\r\n\r\n",
		method, repository, path, ispec.MediaTypeImageManifest, ispec.MediaTypeImageIndex)
}

// conn is one keep-alive connection of the load generator. It does as little as a client can:
// net/http's client would take more of the machine than the programs that it is to measure.
type conn struct {
	*net.TCPConn
	r        *bufio.Reader
	patience time.Duration
}

func dial(ctx context.Context, addr string) (*conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("dial %s: not TCP", addr), c.Close())
	}
	return &conn{tcp, bufio.NewReader(tcp), patience}, nil
}

// answer is the head of a response.
type answer struct {
	status int
	length int64 // of the body that follows, -1 for one without a length
}

// ask sends req and reads the head of its response. The caller reads the body.
func (c *conn) ask(req []byte) (answer, error) {
	if err := c.SetDeadline(time.Now().Add(c.patience)); err != nil {
		return answer{}, err
	}
	if _, err := c.Write(req); err != nil {
		return answer{}, err
	}
	line, err := c.r.ReadSlice('\n')
	if err != nil {
		return answer{}, err
	}
	if len(line) < len("HTTP/1.1 200") {
		return answer{}, fmt.Errorf("not an HTTP response: %.32q", line)
	}
	a := answer{length: -1}
	if a.status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return answer{}, fmt.Errorf("not an HTTP response: %.32q", line)
	}
	for {
		if line, err = c.r.ReadSlice('\n'); err != nil {
			return answer{}, err
		}
		if len(line) <= len("\r\n") {
			break
		}
		const name = "content-length:"
		if len(line) > len(name) && (line[0]|0x20) == 'c' && strings.EqualFold(string(line[:len(name)]), name) {
			if a.length, err = strconv.ParseInt(string(bytes.TrimSpace(line[len(name):])), 10, 64); err != nil {
				return answer{}, fmt.Errorf("not an HTTP response: %.32q", line)
			}
		}
	}
	if bytes.HasPrefix(req, []byte(http.MethodHead)) {
		a.length = 0
	}
	return a, nil
}

// get asks for what must be there and copies size bytes of it to w.
func (c *conn) get(req []byte, size int64, w io.Writer) error {
	a, err := c.ask(req)
	if err != nil {
		return err
	}
	if a.status != http.StatusOK || a.length != size {
		return fmt.Errorf("status %d with %d bytes, want 200 with %d", a.status, a.length, size)
	}
	return c.body(size, w)
}

// body copies size bytes to w. With /dev/null they never enter this process: the kernel splices them.
func (c *conn) body(size int64, w io.Writer) error {
	n, err := io.CopyN(w, c.r, min(size, int64(c.r.Buffered())))
	if err == nil && n < size {
		_, err = io.CopyN(w, c.TCPConn, size-n)
	}
	return err
}

// sink is where bodies go that nobody reads.
func sink() (*os.File, error) { return os.OpenFile(os.DevNull, os.O_WRONLY, 0) }
