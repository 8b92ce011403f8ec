// A docker credential helper that knows the accounts in the file $HELPER_ACCOUNTS: lines of server,
// user and secret. It notes each question behind them, and says secrets where no helper should.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

func main() {
	raw, err := io.ReadAll(os.Stdin)
	if err != nil || len(os.Args) != 2 || os.Args[1] != "get" {
		os.Exit(2)
	}
	server := strings.TrimSpace(string(raw))
	file, err := os.OpenFile(os.Getenv("HELPER_ACCOUNTS"), os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		os.Exit(2)
	}
	defer file.Close()
	fmt.Fprintf(os.Stderr, "canary-stderr for %s\n", server)
	for lines := bufio.NewScanner(file); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || fields[0] != server {
			continue
		}
		fmt.Fprintf(file, "asked %s\n", server)
		switch fields[1] {
		case "fails":
			fmt.Println("canary-stdout:", fields[2])
			os.Exit(1)
		case "babbles":
			fmt.Println("canary-stdout:", fields[2])
			return
		case "hangs":
			time.Sleep(time.Hour)
		}
		fmt.Printf(`{"ServerURL":%q,"Username":%q,"Secret":%q}`, server, fields[1], fields[2])
		return
	}
	fmt.Println("credentials not found in native keychain")
	os.Exit(1)
}
