package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socketMode lets the mirror's user and the socket's group in; root needs no leave.
const socketMode = 0o660

// maxGroups is how many groups a process can be in (NGROUPS_MAX).
const maxGroups = 64 << 10

// socket is the control socket: a file, not an abstract name, which any process could reach whatever the
// file system says (CVE-2020-15257). It accepts root, the user that it runs as, and members of its group.
type socket struct {
	net.Listener
	group  uint32
	logger *slog.Logger
}

// listenControl makes the socket, in the place of one that a killed process has left. Nobody but us is in
// the data folder; somewhere else another mirror may listen, and keeps its socket.
func listenControl(path string, logger *slog.Logger) (*socket, error) {
	conn, err := net.Dial("unix", path)
	if err == nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%s: another mirror listens there", path)
	}
	if !nobodyListens(err) {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("%s: is there, and is not a socket", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// The file gets the mode of the socket that is bound, less the umask: never a moment open to others.
	narrow := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) error {
		var err error
		return errors.Join(conn.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), socketMode) }), err)
	}}
	l, err := narrow.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	if err == nil {
		err = os.Chmod(path, socketMode) // the umask may have taken the group away
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &socket{l, info.Sys().(*syscall.Stat_t).Gid, logger}, nil
}

// nobodyListens reports whether a dial of a unix socket failed for want of a process behind it.
func nobodyListens(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
}

// Accept returns the next connection of somebody who may change things. Others are told nothing.
func (s *socket) Accept() (net.Conn, error) {
	for {
		conn, err := s.Listener.Accept()
		if err != nil {
			return nil, err
		}
		p, err := peerOf(conn.(*net.UnixConn))
		if err == nil && s.admits(p) {
			return &peerConn{conn, p}, nil
		}
		_ = conn.Close()
		s.logger.Warn("control refused", "client", p.String(), "err", err)
	}
}

func (s *socket) admits(p peer) bool {
	return p.Uid == 0 || p.Uid == uint32(os.Geteuid()) || slices.Contains(p.groups, s.group)
}

// peer is the process at the other end, as it was when it connected.
type peer struct {
	unix.Ucred
	groups []uint32
}

// Network is for net.Addr.
func (peer) Network() string { return "unix" }

// String is how the log names it.
func (p peer) String() string { return fmt.Sprintf("pid %d uid %d", p.Pid, p.Uid) }

// peerConn is a connection whose remote address says who it is.
type peerConn struct {
	net.Conn
	peer peer
}

// RemoteAddr is the peer.
func (c *peerConn) RemoteAddr() net.Addr { return c.peer }

func peerOf(conn *net.UnixConn) (peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return peer{}, err
	}
	var p peer
	var cerr error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); cerr == nil {
			p = peer{*cred, append(supplementary(fd), cred.Gid)}
		}
	})
	return p, errors.Join(err, cerr)
}

// supplementary are the groups of the peer besides its first; none before Linux 4.13.
func supplementary(fd uintptr) []uint32 {
	groups := make([]uint32, 32)
	for {
		size := uint32(len(groups)) * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4]
		case errno == unix.ERANGE && len(groups) < maxGroups:
			groups = make([]uint32, maxGroups)
		default:
			return nil
		}
	}
}
