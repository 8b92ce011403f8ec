package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
	"syscall"
	"time"
)

// suspicious is after how long a kept connection that does not answer casts doubt on the others: before
// those who wait for it give up, and ask again.
const suspicious = time.Second

// try sends a request, redirects included. One that got no answer on a connection that had served
// before is sent a second time, on a new one: the connection may have died in the pool, forgotten by
// a firewall, and then nobody is to blame (FAULTS F76). again says that this was so.
func (c *Client) try(client *http.Client, req *http.Request) (resp *http.Response, again bool, err error) {
	var reused atomic.Bool
	doubt := stopped(func() { c.pool.closeIdle(c) })
	defer doubt.Stop()
	trace := &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			if reused.Store(info.Reused); info.Reused {
				doubt.Reset(suspicious)
			}
		},
		GotFirstResponseByte: func() { doubt.Stop() },
	}
	req = req.WithContext(httptrace.WithClientTrace(req.Context(), trace))
	resp, err = client.Do(req)
	if err == nil || !reused.Load() || !unanswered(err) || req.Context().Err() != nil {
		return resp, false, err
	}
	c.pool.closeIdle(c) // so that the next one is new
	if req.GetBody != nil {
		body, err := req.GetBody()
		if err != nil {
			return nil, false, err
		}
		req.Body = body
	}
	resp, err = client.Do(req)
	return resp, true, err
}

// unanswered reports whether a connection ended, or said nothing for too long, before an answer came.
func unanswered(err error) bool {
	var dial *DialError
	var network net.Error
	return !errors.As(err, &dial) && !errors.Is(err, context.Canceled) &&
		(errors.As(err, &network) && network.Timeout() || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
			errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE))
}

// closeIdle closes the connections that are kept to c's host, for whatever registry: what is pooled is
// as likely to be dead as the one that has just been.
func (p *Pool) closeIdle(c *Client) {
	c.http.CloseIdleConnections()
	for _, other := range p.All() {
		if other != c && hostPort(other.base) == hostPort(c.base) {
			other.http.CloseIdleConnections()
		}
	}
}
