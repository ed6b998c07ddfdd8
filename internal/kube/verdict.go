package kube

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// The conditions on every policy.
const (
	// conditionAccepted: this version of the policy is in force.
	conditionAccepted = "Accepted"
	// conditionProgrammed: every proxy that it is for has acknowledged it.
	conditionProgrammed = "Programmed"

	conditionTrue  = "True"
	conditionFalse = "False"

	// maxMessage bounds what is written into a condition or an Event.
	maxMessage = 1000
	// maxShown is how many problems a message names.
	maxShown = 3
)

// Verdict is what became of one version of a policy.
type Verdict struct {
	Kind, Namespace, Name, UID string
	Generation                 int64
	// Accepted: it is in force. Else LastGood, an earlier version is; or Denies,
	// whoever it could select denies everything.
	Accepted, LastGood, Denies bool
	// Errors it was refused for, and Warnings, one line each.
	Errors, Warnings []string
	// Selected workloads, and those whose proxies have acknowledged or refused.
	Selected, Programmed, Refused int
}

// condition is one entry of status.conditions that is ours.
type condition struct {
	Type               string `json:"type"`
	Status             string `json:"status"`
	Reason             string `json:"reason"`
	Message            string `json:"message"`
	LastTransitionTime string `json:"lastTransitionTime"`
	ObservedGeneration int64  `json:"observedGeneration"`
}

// conditions are what the verdict says.
func (v *Verdict) conditions() (accepted, programmed condition) {
	accepted = condition{Type: conditionAccepted, Status: conditionTrue, Reason: "Accepted", Message: "the policy is in force", ObservedGeneration: v.Generation}
	programmed = condition{Type: conditionProgrammed, ObservedGeneration: v.Generation}
	if len(v.Warnings) > 0 {
		accepted.Reason = "AcceptedWithWarnings"
		accepted.Message = clip("the policy is in force; " + some(v.Warnings))
	}
	if !v.Accepted {
		outcome := "nothing is in force in its place"
		switch {
		case v.LastGood:
			outcome = "its last good version stays in force"
		case v.Denies:
			outcome = "there is no earlier version, so every workload it could select denies everything"
		}
		accepted.Status, accepted.Reason, accepted.Message = conditionFalse, "Invalid", clip(some(v.Errors)+"; "+outcome)
		programmed.Status, programmed.Reason = conditionFalse, "NotAccepted"
		programmed.Message = fmt.Sprintf("this version is in force nowhere; %s what is in its place", v.progress())
		return accepted, programmed
	}
	programmed.Message = v.progress()
	switch {
	case v.Selected == 0:
		programmed.Status, programmed.Reason, programmed.Message = conditionTrue, "NoWorkloads", "it selects no workload of the mesh"
	case v.Programmed >= v.Selected:
		programmed.Status, programmed.Reason = conditionTrue, "Programmed"
	case v.Refused > 0:
		programmed.Status, programmed.Reason = conditionFalse, "RefusedByProxy"
		programmed.Message += fmt.Sprintf(", %d refuse it: see castellan proxy status", v.Refused)
	default:
		programmed.Status, programmed.Reason = conditionFalse, "Pending"
	}
	return accepted, programmed
}

func (v *Verdict) progress() string {
	return fmt.Sprintf("%d of %d proxies have acknowledged", v.Programmed, v.Selected)
}

// some is the first few of the lines.
func some(lines []string) string {
	text := strings.Join(lines[:min(len(lines), maxShown)], "; ")
	if n := len(lines) - maxShown; n > 0 {
		text += fmt.Sprintf("; and %d more", n)
	}
	return text
}

// clip bounds text, at the boundary of a character.
func clip(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + " …"
	}
	return s
}

// ours finds a condition in a status as it was read; the zero condition if it has
// none that can be read.
func ours(status []byte, kind string) condition {
	var s struct {
		Conditions []json.RawMessage `json:"conditions"`
	}
	if json.Unmarshal(status, &s) != nil {
		return condition{}
	}
	for _, raw := range s.Conditions {
		var c condition
		if json.Unmarshal(raw, &c) == nil && c.Type == kind {
			return c
		}
	}
	return condition{}
}

// says reports whether two conditions say the same, whenever they began to.
func (c condition) says(other condition) bool {
	c.LastTransitionTime, other.LastTransitionTime = "", ""
	return c == other
}

// since gives c the time of its transition: that of what it replaces, unless it
// says otherwise.
func (c condition) since(before condition, now time.Time) condition {
	c.LastTransitionTime = before.LastTransitionTime
	if before.Status != c.Status || before.LastTransitionTime == "" {
		c.LastTransitionTime = now.UTC().Format(time.RFC3339)
	}
	return c
}

// statusPatch is a merge patch that replaces our conditions and leaves those of
// others as they are. It holds only for the version of the object that it was made
// of, since a list is replaced whole.
func statusPatch(version string, status []byte, generation int64, conditions ...condition) ([]byte, error) {
	var s struct {
		Conditions []json.RawMessage `json:"conditions"`
	}
	if len(status) > 0 && json.Unmarshal(status, &s) != nil {
		s.Conditions = nil // of no form anybody reads
	}
	var list []any
	for _, raw := range s.Conditions {
		var c struct {
			Type string `json:"type"`
		}
		if json.Unmarshal(raw, &c) == nil && c.Type != conditionAccepted && c.Type != conditionProgrammed {
			list = append(list, raw)
		}
	}
	for _, c := range conditions {
		list = append(list, c)
	}
	return json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": version},
		"status":   map[string]any{"conditions": list, "observedGeneration": generation},
	})
}
