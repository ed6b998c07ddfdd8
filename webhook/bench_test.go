package webhook_test

import (
	"testing"

	"castellan.dev/webhook"
)

func BenchmarkInject(b *testing.B) {
	c := injectCases(b)["probes"]
	in := c.injector(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := in.Inject(&c.Pod, c.namespace()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkInjectAndPatch(b *testing.B) {
	c := injectCases(b)["plain"]
	in := c.injector(b)
	b.ReportAllocs()
	for b.Loop() {
		result, err := in.Inject(&c.Pod, c.namespace())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := webhook.Patch(&c.Pod, result.Pod); err != nil {
			b.Fatal(err)
		}
	}
}
