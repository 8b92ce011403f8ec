package upstream

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http/httpproxy"
	"golang.org/x/net/publicsuffix"
)

// ProxyEnv and ProxyNone are what Config.Proxy may be, besides a URL.
const (
	ProxyEnv  = "env" // as HTTPS_PROXY, HTTP_PROXY and NO_PROXY say; "" is the same
	ProxyNone = "none"
)

const (
	connectTimeout   = 4 * time.Second // of a proxy's answer to CONNECT, which dials in our stead
	maxConnectAnswer = 16 << 10
)

// route is how one upstream, and what it redirects to, is connected to: straight or through a proxy,
// to none but those whom the guard lets it reach. TLS is ours too, so that its failures are told from
// those of the request, and so that a client certificate goes to nobody but the upstream.
type route struct {
	cfg    Config
	tls    *tls.Config
	dialer *dialer
	proxy  func(*url.URL) (*url.URL, error)
	own    []string // host:port that may know who we are
	named  []string // host:port that may be reached wherever they are

	mu      sync.Mutex
	proxies map[string]bool // host:port of the proxies that were used so far
}

func newRoute(p *Pool, cfg Config, base *url.URL) (*route, error) {
	r := &route{cfg: cfg, tls: p.settings.TLS, own: []string{hostPort(base)}, proxies: map[string]bool{}}
	switch cfg.Proxy {
	case "", ProxyEnv:
		r.proxy = httpproxy.FromEnvironment().ProxyFunc()
	case ProxyNone:
		r.proxy = func(*url.URL) (*url.URL, error) { return nil, nil }
	default:
		proxy, err := url.Parse(cfg.Proxy)
		if err != nil || proxy.Host == "" || (proxy.Scheme != "http" && proxy.Scheme != "https") {
			return nil, errors.New("the proxy is not an http or https URL") // which may hold a password
		}
		r.proxy = func(*url.URL) (*url.URL, error) { return proxy, nil }
	}
	for _, host := range cfg.TrustedRealms {
		r.own = append(r.own, withPorts(host)...)
	}
	r.named = slices.Clone(r.own[1:]) // not the upstream itself: with any_registry a client may have named it
	for _, host := range cfg.RedirectHosts {
		r.named = append(r.named, withPorts(host)...)
	}
	allowed := func(hostport string) bool {
		return p.configured(hostport) || slices.Contains(r.named, hostport) || r.isProxy(hostport)
	}
	r.dialer = &dialer{lookup: p.settings.Lookup, dial: p.settings.Dial, allowed: allowed, refused: &p.refused}
	return r, nil
}

// withPorts is the addresses of a host that may have been given without a port.
func withPorts(host string) []string {
	if _, _, err := net.SplitHostPort(host); err == nil {
		return []string{host}
	}
	host = strings.Trim(host, "[]")
	return []string{net.JoinHostPort(host, "443"), net.JoinHostPort(host, "80")}
}

func (r *route) transport() *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Transport{
		DialContext:            r.dialer.DialContext,
		DialTLSContext:         r.dialTLS,
		Proxy:                  r.proxyHTTP,
		Protocols:              protocols,
		DisableCompression:     true, // digests are of the bytes as sent
		ResponseHeaderTimeout:  firstByteTimeout,
		IdleConnTimeout:        idleTimeout,
		MaxIdleConnsPerHost:    64,
		MaxResponseHeaderBytes: maxHeaderBytes,
		ReadBufferSize:         64 << 10,
	}
}

// proxyHTTP is the proxy of a request over plain HTTP. dialTLS finds the way of the others.
func (r *route) proxyHTTP(req *http.Request) (*url.URL, error) {
	if req.URL.Scheme != "http" {
		return nil, nil
	}
	return r.proxyTo(req.URL)
}

// proxyTo is the proxy on the way to target, nil for none. Nobody is asked for a target that the
// guard would not let us dial.
func (r *route) proxyTo(target *url.URL) (*url.URL, error) {
	proxy, err := r.proxy(target)
	if err != nil {
		return nil, &DialError{Phase: "setup", Host: hostPort(target), Err: errors.New("the proxy of the environment is not a URL")}
	}
	if proxy == nil {
		return nil, nil
	}
	if hostport := hostPort(target); !r.dialer.allowed(hostport) && !isPublicName(target.Hostname()) {
		r.dialer.refused.Add(1)
		return nil, &DialError{Phase: "guard", Host: hostport, Err: errors.New("not a public name")}
	}
	r.mu.Lock()
	r.proxies[hostPort(proxy)] = true
	r.mu.Unlock()
	return proxy, nil
}

// isPublicName reports whether host is a name on the Internet: a proxy looks it up, so that there is
// no address to judge. Addresses and names of one's own network (metadata.google.internal, router) are not.
func isPublicName(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if _, err := netip.ParseAddr(host); err == nil || !isName(host) {
		return false
	}
	suffix, listed := publicsuffix.PublicSuffix(host)
	return strings.Contains(suffix, ".") || listed && host != suffix // only what is on the list has a dot
}

func (r *route) isProxy(hostport string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.proxies[hostport]
}

// dialTLS connects an http.Transport to host:port with TLS. Errors are *DialError, or ctx's if that
// ended first.
func (r *route) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	cfg, err := r.tlsTo(addr)
	if err != nil {
		return nil, &DialError{Phase: "setup", Host: addr, Err: err}
	}
	var proxy *url.URL
	if !r.isProxy(addr) {
		if proxy, err = r.proxyTo(&url.URL{Scheme: "https", Host: addr}); err != nil {
			return nil, err
		}
	}
	var conn net.Conn
	if proxy == nil {
		conn, err = r.dialer.DialContext(ctx, network, addr)
	} else {
		conn, err = r.tunnel(ctx, network, proxy, addr)
	}
	if err != nil {
		return nil, err
	}
	return handshake(ctx, conn, cfg, addr)
}

// tunnel is a connection to addr that a proxy makes (RFC 9110, section 9.3.6).
func (r *route) tunnel(ctx context.Context, network string, proxy *url.URL, addr string) (net.Conn, error) {
	var conn net.Conn
	var err error
	if proxy.Scheme == "https" {
		conn, err = r.dialTLS(ctx, network, hostPort(proxy))
	} else {
		conn, err = r.dialer.DialContext(ctx, network, hostPort(proxy))
	}
	if err != nil {
		return nil, err
	}
	asking, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	stop := context.AfterFunc(asking, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = connect(conn, proxy.User, addr)
	if !stop() && err == nil {
		err = asking.Err() // too late: its deadline is over
	}
	if err != nil {
		conn.Close()
		if asking.Err() != nil {
			err = asking.Err()
		}
		return nil, failedIn(ctx, "proxy", addr, fmt.Errorf("%s: %w", proxy.Host, err))
	}
	return conn, nil
}

// connect asks the proxy behind conn for a tunnel.
func connect(conn net.Conn, user *url.Userinfo, addr string) error {
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: addr}, Host: addr, Header: http.Header{"User-Agent": {"breakwater"}}}
	if user != nil {
		password, _ := user.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	if err := req.Write(conn); err != nil {
		return err
	}
	answer := bufio.NewReader(io.LimitReader(conn, maxConnectAnswer))
	resp, err := http.ReadResponse(answer, req)
	switch {
	case err != nil:
		return errors.New("no answer in HTTP")
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("answered %d", resp.StatusCode)
	case answer.Buffered() > 0:
		return errors.New("sent bytes that nobody asked for")
	}
	return nil
}

// tlsTo is the configuration for a connection to addr. Files are read for each, so that new ones need
// no restart; connections are few, since they are kept.
func (r *route) tlsTo(addr string) (*tls.Config, error) {
	cfg := r.tls.Clone()
	if cfg == nil {
		cfg = &tls.Config{}
	}
	if cfg.ServerName == "" {
		cfg.ServerName, _, _ = net.SplitHostPort(addr)
	}
	cfg.NextProtos = []string{"http/1.1"}
	if r.cfg.CAFile != "" {
		pem, err := os.ReadFile(r.cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		if cfg.RootCAs != nil {
			cfg.RootCAs = cfg.RootCAs.Clone()
		} else if cfg.RootCAs, err = x509.SystemCertPool(); err != nil {
			cfg.RootCAs = x509.NewCertPool() // a system without any
		}
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file: no certificate in %s", r.cfg.CAFile)
		}
	}
	if r.cfg.CertFile != "" && slices.Contains(r.own, addr) {
		pair, err := tls.LoadX509KeyPair(r.cfg.CertFile, r.cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("client_cert: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}

func handshake(ctx context.Context, raw net.Conn, cfg *tls.Config, addr string) (net.Conn, error) {
	waiting, cancel := context.WithTimeout(ctx, tlsTimeout)
	defer cancel()
	conn := tls.Client(raw, cfg)
	err := conn.HandshakeContext(waiting)
	if trace := httptrace.ContextClientTrace(ctx); trace != nil && trace.TLSHandshakeDone != nil {
		trace.TLSHandshakeDone(conn.ConnectionState(), err)
	}
	if err != nil {
		raw.Close()
		return nil, &DialError{Phase: "tls", Host: addr, Err: err}
	}
	return conn, nil
}
