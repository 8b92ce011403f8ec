// Bench measures breakwater beside nginx and distribution's registry: one machine, one run, the same
// content, the same load, everything on loopback. What counts are the ratios; the absolute figures
// say more about the machine. The upstream and each program run in processes of their own, the load
// comes from this one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == upstreamRole:
		return serveUpstream()
	case len(args) == 2 && args[0] == distributionRole:
		return serveDistribution(context.Background(), args[1])
	}
	flags := flag.NewFlagSet("bench", flag.ExitOnError)
	only := flags.String("only", "", "measure only the figures whose name matches this `regexp`")
	names := flags.String("programs", "", "run only the programs whose name matches this `regexp`")
	rounds := flags.Int("rounds", 5, "measure each figure this often; the table shows medians")
	file := flags.String("json", "", "also write the report to this `file`")
	profiles := flags.String("cpuprofile", "", "write breakwater's profile of each figure into this `folder`")
	_ = flags.Parse(args) // exits by itself
	onlyFigures, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	onlyPrograms, err := regexp.Compile(*names)
	if err != nil {
		return fmt.Errorf("-programs: %w", err)
	}
	if *rounds < 1 {
		return errors.New("-rounds: at least 1")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := &bench{n: *rounds, profiles: *profiles, maker: newMaker()}
	if b.dir, err = os.MkdirTemp("", "breakwater-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	var found report
	if found.Notes, err = b.gather(ctx, onlyPrograms); err != nil {
		return err
	}
	found.Machine = b.machine()
	found.Notes = append(found.Notes,
		fmt.Sprintf("medians of %d rounds; /nginx, /distribution and /direct are breakwater's figure over theirs", *rounds),
		"nginx keeps tags for 60 days here: it answers them in any outage, and learns of no new image",
		"distribution writes no access log here; the others do")
	found.printMachine(os.Stdout)
	if err := b.measure(ctx, onlyFigures, &found); err != nil {
		return err
	}
	if err := found.print(os.Stdout); err != nil || *file == "" {
		return err
	}
	return found.save(*file)
}
