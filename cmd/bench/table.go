package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"text/tabwriter"
)

// The names in the table's columns.
const (
	breakwater   = "breakwater"
	nginx        = "nginx"
	distribution = "distribution"
	direct       = "direct"
)

// samples collects what was measured: by measure, by program.
type samples struct {
	values map[string]map[string][]float64
	notes  []string // of measurements that failed
}

func newSamples() *samples { return &samples{values: map[string]map[string][]float64{}} }

func (s *samples) add(measure string, m *mirror, value float64) {
	if s.values[measure] == nil {
		s.values[measure] = map[string][]float64{}
	}
	s.values[measure][m.name] = append(s.values[measure][m.name], value)
}

// fail notes, once, that a program could not do what was asked: it has no value then.
func (s *samples) fail(m *mirror, err error) {
	note := fmt.Sprintf("%s: %v", m.name, err)
	if !slices.Contains(s.notes, note) {
		s.notes = append(s.notes, note)
	}
}

// rounds measures the programs in turn, A B C A B C …, so that whatever else the machine does falls
// on all alike; each round begins with another one, so that none always follows the same.
func (s *samples) rounds(n int, mirrors []*mirror, measure func(round int, m *mirror) error) {
	for round := range n {
		for i := range mirrors {
			m := mirrors[(i+round)%len(mirrors)]
			if err := measure(round, m); err != nil {
				s.fail(m, err)
			}
		}
	}
}

// row is one figure of all programs: the median of its samples.
func (s *samples) row(measure, figure, unit string) row {
	return s.rowOf(measure, figure, unit, func(sorted []float64) float64 {
		n := len(sorted)
		return (sorted[(n-1)/2] + sorted[n/2]) / 2
	})
}

// worst is as row, of the largest sample.
func (s *samples) worst(measure, figure, unit string) row {
	return s.rowOf(measure, figure, unit, func(sorted []float64) float64 { return sorted[len(sorted)-1] })
}

func (s *samples) rowOf(measure, figure, unit string, of func(sorted []float64) float64) row {
	r := row{Figure: figure, Unit: unit, Values: map[string]float64{}}
	for program, values := range s.values[measure] {
		slices.Sort(values)
		r.Values[program] = of(values)
	}
	return r
}

// unitStatus is the unit of what is no quantity.
const unitStatus = "status"

// row is one line of the table. A program that could not do it has no value.
type row struct {
	Figure  string             `json:"figure"`
	Unit    string             `json:"unit"`
	Values  map[string]float64 `json:"values"`
	Goal    string             `json:"goal,omitempty"`
	Verdict string             `json:"verdict,omitempty"` // reached, not reached, not measured; "" without a goal
}

// The relations that a goal may ask for.
const (
	atLeast = ">="
	atMost  = "<="
	exactly = "="
)

// goal sets what breakwater's value is to be.
func (r row) goal(relation string, bound float64) row {
	r.Goal = fmt.Sprintf("%s %g", relation, bound)
	return r.judge(relation, bound)
}

// goalOf sets what breakwater's value is to be relative to another program's.
func (r row) goalOf(relation string, factor float64, program string) row {
	r.Goal = fmt.Sprintf("%s %g x %s", relation, factor, program)
	value, ok := r.Values[program]
	if !ok {
		r.Verdict = "not measured"
		return r
	}
	return r.judge(relation, factor*value)
}

func (r row) judge(relation string, bound float64) row {
	value, ok := r.Values[breakwater]
	reached := map[string]bool{atLeast: value >= bound, atMost: value <= bound, exactly: value == bound}
	switch {
	case !ok:
		r.Verdict = "not measured" // a note says why
	case reached[relation]:
		r.Verdict = "reached"
	default:
		r.Verdict = "not reached"
	}
	return r
}

// ratio is breakwater's value over another program's, "-" where either is missing or no quantity.
func (r row) ratio(program string) string {
	b, ok := r.Values[breakwater]
	v, other := r.Values[program]
	if !ok || !other || v == 0 || r.Unit == unitStatus {
		return "-"
	}
	return fmt.Sprintf("%.2f", b/v)
}

func (r row) value(program string) string {
	v, ok := r.Values[program]
	switch {
	case !ok:
		return "-"
	case v == math.Trunc(v), v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// report is all that a run has found out.
type report struct {
	Machine map[string]string `json:"machine"`
	Rows    []row             `json:"rows"`
	Notes   []string          `json:"notes,omitempty"`
}

func (r report) printMachine(w io.Writer) {
	for _, fact := range slices.Sorted(maps.Keys(r.Machine)) {
		fmt.Fprintf(w, "%-13s %s\n", fact, r.Machine[fact])
	}
	fmt.Fprintln(w)
}

func (r report) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "\t\tbreakwater\tnginx\tdistribution\tdirect\t/nginx\t/distribution\t/direct\tgoal\t\n")
	for _, row := range r.Rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", row.Figure, row.Unit,
			row.value(breakwater), row.value(nginx), row.value(distribution), row.value(direct),
			row.ratio(nginx), row.ratio(distribution), row.ratio(direct), row.Goal, row.Verdict)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, note := range r.Notes {
		fmt.Fprintln(w, "-", note)
	}
	return nil
}

func (r report) save(file string) error {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false) // ">=" is for people
	e.SetIndent("", "  ")
	if err := e.Encode(r); err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	return os.WriteFile(file, text.Bytes(), 0o644)
}
