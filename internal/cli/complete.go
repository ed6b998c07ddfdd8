package cli

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// completeTimeout bounds what a shell waits for after a Tab.
	completeTimeout = 3 * time.Second
	maxCompletions  = 500
)

// completePods completes the names of pods after a prefix; before it, files where
// they may be meant. What goes wrong completes to nothing: a shell has no place for it.
func (m *meshFlags) completePods(prefix string, elsewhere cobra.ShellCompDirective) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		if !strings.HasPrefix(word, prefix) {
			return nil, elsewhere
		}
		client, err := m.client()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		namespace, err := m.namespace()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		// A completion runs without the context of a command.
		ctx, cancel := context.WithTimeout(context.Background(), completeTimeout)
		defer cancel()
		list, err := client.Kubernetes().CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{Limit: maxCompletions})
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var names []cobra.Completion
		for i := range list.Items {
			if name := prefix + list.Items[i].Name; strings.HasPrefix(name, word) {
				names = append(names, name)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
