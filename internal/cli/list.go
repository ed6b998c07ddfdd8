package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"sigs.k8s.io/yaml"
)

// listWriter writes a list's elements one by one, to the same effect as writeData
// with all of them. Without end, JSON stays open: half a list must not pass for one.
type listWriter struct {
	w      io.Writer
	format string
	n      int
}

func (l *listWriter) add(v any) error {
	l.n++
	if l.format == "yaml" {
		out, err := yaml.Marshal([]any{v})
		if err != nil {
			return err
		}
		_, err = l.w.Write(out)
		return err
	}
	out, err := json.MarshalIndent(v, "  ", "  ")
	if err != nil {
		return err
	}
	before := ",\n  "
	if l.n == 1 {
		before = "[\n  "
	}
	_, err = l.w.Write(append([]byte(before), out...))
	return err
}

func (l *listWriter) end() error {
	after := "\n]\n"
	switch {
	case l.n == 0:
		after = "[]\n"
	case l.format == "yaml":
		return nil
	}
	_, err := io.WriteString(l.w, after)
	return err
}

// tableBlock is how many rows of a table are looked at for the width of its columns.
const tableBlock = 256

// tableWriter writes a table of any length: block by block, with columns that only
// grow.
type tableWriter struct {
	w      io.Writer
	rows   [][]string
	widths []int
}

func (t *tableWriter) add(cells ...string) error {
	t.rows = append(t.rows, cells)
	if len(t.rows) < tableBlock {
		return nil
	}
	return t.flush()
}

func (t *tableWriter) flush() error {
	for _, row := range t.rows {
		for i, cell := range row {
			if i == len(t.widths) {
				t.widths = append(t.widths, 0)
			}
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b bytes.Buffer
	for _, row := range t.rows {
		var line strings.Builder
		for i, cell := range row {
			line.WriteString(cell)
			if i < len(row)-1 {
				line.WriteString(strings.Repeat(" ", t.widths[i]-utf8.RuneCountInString(cell)+2))
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	t.rows = t.rows[:0]
	if _, err := t.w.Write(b.Bytes()); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}
