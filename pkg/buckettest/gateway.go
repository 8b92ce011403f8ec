package buckettest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// startLimit is for a machine that is busy with other tests.
const startLimit = 30 * time.Second

// Gateway is versitygw itself, with nothing in front of it: for programs that measure and simulate.
// Tests have [Start].
type Gateway struct {
	URL string

	folder    string // of its buckets
	address   string
	transport *http.Transport
	process   *os.Process
	ended     sync.WaitGroup
}

// StartGateway starts versitygw, with the one bucket [Name], in a folder that exists. Who asks it for
// something has the credentials of [Environment].
func StartGateway(folder string) (*Gateway, error) {
	program, err := installed()
	if err != nil {
		return nil, fmt.Errorf("%w; testdata/install.sh installs it", err)
	}
	if err := os.Mkdir(filepath.Join(folder, Name), 0o755); err != nil { // which makes it a bucket
		return nil, err
	}
	var said []byte
	for range 3 { // on a free port: another one if somebody has taken it meanwhile
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		address := l.Addr().String()
		_ = l.Close()
		g := &Gateway{URL: "http://" + address, folder: folder, address: address,
			transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64}}
		if said, err = g.run(program); err == nil {
			return g, nil
		}
	}
	return nil, fmt.Errorf("versitygw does not start: %s", said)
}

// run returns when the gateway answers, or with its last words.
func (g *Gateway) run(program string) ([]byte, error) {
	var output bytes.Buffer
	cmd := exec.Command(program, "--port", g.address, "--access", AccessKey, "--secret", SecretKey,
		"--health", "/health", "--keep-alive", "--quiet", "posix", g.folder)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	g.process = cmd.Process
	exited := make(chan error, 1)
	g.ended.Go(func() { exited <- cmd.Wait() })
	deadline := time.After(startLimit)
	for {
		resp, err := (&http.Client{Transport: g.transport}).Get(g.URL + "/health")
		if err == nil {
			_ = resp.Body.Close()
			return nil, nil
		}
		select {
		case err := <-exited:
			return output.Bytes(), fmt.Errorf("versitygw ended: %w", err)
		case <-deadline:
			g.Close()
			return output.Bytes(), errors.New("versitygw does not answer")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Close ends it at once.
func (g *Gateway) Close() {
	g.transport.CloseIdleConnections()
	_ = g.process.Kill()
	g.ended.Wait()
}

// Proxy passes requests on to it as they are: their signatures cover the Host.
func (g *Gateway) Proxy() http.Handler {
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: g.address})
			r.Out.Host = r.In.Host
		},
		Transport:     g.transport,
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0),
		ErrorHandler:  func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
}

// installed is where testdata/install.sh puts versitygw.
func installed() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	program := filepath.Join(cache, "breakwater-test", "bin", "versitygw")
	_, err = os.Stat(program)
	return program, err
}
