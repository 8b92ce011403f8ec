package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// breakwater is the real program, built and started for the demo.
type breakwater struct {
	addr string
	cmd  *exec.Cmd
	done chan struct{} // closed once it has ended and its log is read
}

const breakwaterConfig = `listen: 127.0.0.1:0
admin: 127.0.0.1:0
data: %[1]s
capacity: 1GiB
default_registry: %[2]s
registries:
  %[2]s:
    upstreams:
      - url: %[3]s
`

// startTime is how long breakwater may take to listen. It promises a second.
const startTime = 10 * time.Second

// startBreakwater builds it into dir and starts it as a mirror of the registry called name, at url.
func startBreakwater(ctx context.Context, dir, name, url string) (*breakwater, error) {
	binary, configFile := filepath.Join(dir, "breakwater"), filepath.Join(dir, "config.yaml")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", binary, "breakwater/cmd/breakwater").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build breakwater: %w\n%s", err, out)
	}
	config := fmt.Sprintf(breakwaterConfig, filepath.Join(dir, "data"), name, url)
	if err := os.WriteFile(configFile, []byte(config), 0o600); err != nil {
		return nil, err
	}
	log, output := io.Pipe()
	b := &breakwater{
		cmd:  exec.CommandContext(ctx, binary, "serve", "--config", configFile, "--log-format", "json"),
		done: make(chan struct{}),
	}
	b.cmd.Stdout, b.cmd.Stderr = output, output
	if err := b.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start breakwater: %w", err)
	}
	serving := make(chan string, 1)
	go func() { _ = output.CloseWithError(b.cmd.Wait()) }() // ends with the process, and so ends the next
	go func() {
		defer close(b.done)
		readLog(log, serving)
	}()
	select {
	case b.addr = <-serving:
		return b, nil
	case <-b.done:
		return nil, errors.New("breakwater ended at once") // and has said why
	case <-time.After(startTime):
		b.stop()
		return nil, fmt.Errorf("breakwater does not serve after %s", startTime)
	}
}

// readLog reads the log to its end, tells where breakwater listens, and shows what is no log line.
func readLog(log io.Reader, serving chan<- string) {
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		var line struct{ Msg, Listen string }
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			fmt.Fprintln(os.Stderr, lines.Text())
		} else if line.Msg == "serving" {
			serving <- line.Listen
		}
	}
}

func (b *breakwater) stop() {
	_ = b.cmd.Process.Signal(syscall.SIGTERM)
	<-b.done
}
