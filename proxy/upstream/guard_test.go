package upstream

import (
	"net/netip"
	"strings"
	"testing"
)

func TestH29GuardAddresses(t *testing.T) {
	refused := strings.Fields(`
		127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1
		100.64.0.1 100.127.255.255 100.100.100.200 169.254.169.254 169.254.170.2 168.63.129.16
		192.0.0.1 192.0.0.192 192.88.99.1 198.18.0.1 198.19.255.255 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
		:: ::1 ::1%lo ::127.0.0.1 ::8.8.8.8 fe80::1 fe80::1%eth0 febf::1 fec0::1 fc00::1 fd00:ec2::254 ff02::1 ff0e::1
		::ffff:127.0.0.1 ::ffff:169.254.169.254 ::ffff:10.1.2.3 ::ffff:0.0.0.0 ::ffff:169.254.169.254%eth0 ::ffff:0:169.254.169.254
		64:ff9b::127.0.0.1 64:ff9b::169.254.169.254 64:ff9b::10.0.0.1 64:ff9b::10.0.0.1%eth0 64:ff9b:1::8.8.8.8 64:ff9b:1:ffff::1
		2002:7f00:1:: 2002:a9fe:a9fe::1 2002:808:808::1 2001::1 2001:0:7f00:1::1 2001:2::1 2001:10::1
		100::1 5f00::1 4000::1
	`)
	for _, s := range refused {
		if isPublic(netip.MustParseAddr(s)) {
			t.Errorf("%s passes for public", s)
		}
	}
	passed := strings.Fields(`
		8.8.8.8 1.1.1.1 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255
		169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255
		198.20.0.0 223.255.255.255 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2606:4700::1 2001:4860:4860::8888 2a00:1450::1
	`)
	for _, s := range passed {
		if !isPublic(netip.MustParseAddr(s)) {
			t.Errorf("%s does not pass for public", s)
		}
	}
}

func TestH29GuardNames(t *testing.T) {
	for _, s := range []string{
		"", ".", "..", "127.1", "127.0.1", "2130706433", "0x7f000001", "0X7F000001", "0x", "0177.0.0.1", "017700000001", "0x7f.0.0.1",
		"127.0.0.1.", "127.0.0.0x1", "1.2.3.4.5", "example.1", "example.0xff", "example..com", ".example.com", "exa mple.com",
		"example.com\x00", "example.com%00", "example.com/", "a@b", "user:pw", "[::1]", "::1", "１２７.0.0.1", "①②⑦.0.0.1", "quay。io",
		strings.Repeat("a", 64) + ".com", strings.Repeat("a.", 127) + "com",
	} {
		if isName(s) {
			t.Errorf("%q passes for a name to look up", s)
		}
	}
	for _, s := range []string{
		"quay.io", "quay.io.", "Quay.IO", "localhost", "registry-1.docker.io", "123456789012.dkr.ecr.us-east-1.amazonaws.com",
		"my_registry", "1and1.com", "127.0.0.1.nip.io", "xn--bcher-kva.example", "0x7f.com", "a.0xfg", "x",
	} {
		if !isName(s) {
			t.Errorf("%q does not pass for a name to look up", s)
		}
	}
}
