package webhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"

	"castellan.dev/internal/config"
)

const (
	maxItems    = 256
	maxImage    = 512
	maxSeconds  = 3600
	maxDrain    = time.Hour
	maxQuantity = 32
)

// parseSwitch takes the words of YAML, as Istio does.
func parseSwitch(value string) (bool, error) {
	switch strings.ToLower(value) {
	case "y", "yes", "true", "on":
		return true, nil
	case "n", "no", "false", "off":
		return false, nil
	}
	return false, errors.New(`want "true" or "false"`)
}

func parseQuantity(value string) (resource.Quantity, error) {
	if len(value) > maxQuantity {
		return resource.Quantity{}, fmt.Errorf("%q is too long for a quantity", shorten(value))
	}
	q, err := resource.ParseQuantity(value)
	if err != nil || q.Sign() <= 0 {
		return resource.Quantity{}, errors.New(`want a positive quantity such as "100m" or "64Mi"`)
	}
	// Written as the API server writes it, so that it is not read as a change.
	_ = q.String()
	return q, nil
}

// secondsFrom parses a whole number that is not less than low.
func secondsFrom(low int64) func(string) (int32, error) {
	return func(value string) (int32, error) {
		n, err := strconv.ParseInt(value, 10, 32)
		if err != nil || n < low || n > maxSeconds {
			return 0, fmt.Errorf("want a whole number from %d to %d", low, maxSeconds)
		}
		return int32(n), nil
	}
}

// parseLogLevel takes Envoy's levels too, the nearest of ours for each.
func parseLogLevel(value string) (string, error) {
	switch value {
	case "trace", "debug":
		return "debug", nil
	case "info":
		return "info", nil
	case "warn", "warning":
		return "warn", nil
	case "error", "critical", "off":
		return "error", nil
	}
	return "", errors.New("want debug, info, warn or error")
}

func parseImage(value string) (string, error) { return value, checkImage(value) }

// checkImage refuses what is no reference of an image. The registry's own grammar
// is narrower; what matters is that nothing else can stand here.
func checkImage(value string) error {
	if value == "" || len(value) > maxImage || !alphanumeric(value[0]) {
		return errors.New("want an image's reference")
	}
	for _, c := range []byte(value) {
		if !alphanumeric(c) && !strings.ContainsRune("./:@_-", rune(c)) {
			return errors.New("want an image's reference")
		}
	}
	return nil
}

func alphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// list splits at commas; an empty value is an empty list.
func list(value string) ([]string, error) {
	if strings.TrimSpace(value) == "" {
		return nil, nil
	}
	items := strings.Split(value, ",")
	if len(items) > maxItems {
		return nil, fmt.Errorf("%d items, at most %d are taken", len(items), maxItems)
	}
	for i := range items {
		items[i] = strings.TrimSpace(items[i])
	}
	return items, nil
}

func parsePortsOrAll(value string) (config.PortList, error) {
	items, err := list(value)
	if err != nil {
		return nil, err
	}
	ports := config.PortList(items)
	_, all, err := ports.Ranges()
	if err != nil {
		return nil, err
	}
	if all {
		return config.PortList{"*"}, nil
	}
	return ports, nil
}

func parsePorts(value string) (config.PortList, error) {
	ports, err := parsePortsOrAll(value)
	if err == nil && slices.Contains(ports, "*") {
		return nil, errors.New(`"*" would leave nothing to capture; to capture nothing, give an empty include list`)
	}
	return ports, err
}

func parseRangesOrAll(value string) ([]string, error) {
	items, err := list(value)
	if err != nil {
		return nil, err
	}
	_, all, err := config.ParseIPRanges(items)
	if err != nil {
		return nil, err
	}
	if all {
		return []string{"*"}, nil
	}
	return items, nil
}

func parseRanges(value string) ([]string, error) {
	ranges, err := parseRangesOrAll(value)
	if err == nil && slices.Contains(ranges, "*") {
		return nil, errors.New(`"*" would leave nothing to capture; to capture nothing, give an empty include list`)
	}
	return ranges, err
}

func parseDuration(value string) (time.Duration, error) {
	d, err := time.ParseDuration(value)
	if err != nil || d < 0 || d > maxDrain {
		return 0, fmt.Errorf(`want a duration such as "30s", at most %v`, maxDrain)
	}
	return d, nil
}

// proxyConfig reads the annotation that with Istio holds a whole ProxyConfig in
// YAML. What maps is taken; other settings are Envoy's and change nothing here.
func (o *options) proxyConfig(value string) error {
	raw, err := yaml.YAMLToJSONStrict([]byte(value))
	if err != nil {
		return errors.New("not YAML, or a key given twice")
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return errors.New("want a YAML mapping")
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if err := o.proxyField(name, fields[name]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (o *options) proxyField(name string, raw json.RawMessage) error {
	text := func(set setter) error {
		var s string
		if err := json.Unmarshal(raw, &s); err != nil {
			return errors.New("want a string")
		}
		return set(s)
	}
	switch name {
	case "holdApplicationUntilProxyStarts":
		// A native sidecar always does.
		if err := json.Unmarshal(raw, &o.hold); err != nil {
			return errors.New("want true or false")
		}
		return nil
	case "terminationDrainDuration":
		return text(o.drainDuration)
	case "interceptionMode":
		return text(checkInterception)
	default:
		o.warnf("annotation proxy.istio.io/config: %s changes nothing here", shorten(name))
		return nil
	}
}
