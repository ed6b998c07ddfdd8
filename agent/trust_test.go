package agent_test

import (
	"bytes"
	"crypto/x509"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"castellan.dev/agent/agenttest"
	"castellan.dev/sds"
)

func TestTrustRules(t *testing.T) {
	s := agenttest.New(t)
	accounts := []string{account, "shop/frontend"}
	cfg := configure(t, s, accounts...)
	n := start(t, s, cfg)
	n.ready()
	var svids []*x509svid.SVID
	t.Run("trust-04 a socket serves its workload and no other, whatever is asked", func(t *testing.T) {
		for i, a := range accounts {
			got, err := n.spiffe(i).FetchX509SVIDs(t.Context())
			if err != nil || len(got) != 1 || got[0].ID.String() != agenttest.ID(a) {
				t.Fatalf("%s: got %v %v", a, got, err)
			}
			svids = append(svids, got[0])
			other := agenttest.ID(accounts[1-i])
			resp, err := secretv3.NewSecretDiscoveryServiceClient(n.dial(i)).FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{
				TypeUrl: sds.TypeSecret, ResourceNames: []string{other, sds.NameDefault},
			})
			if err != nil || len(resp.GetResources()) != 1 || !bytes.Contains(resp.GetResources()[0].GetValue(), []byte("CERTIFICATE")) {
				t.Errorf("%s: asked for %s and default: %v %v", a, other, resp, err)
			}
		}
	})
	if t.Failed() {
		return
	}
	t.Run("trust-05 every workload has a key of its own, made by the agent", func(t *testing.T) {
		asked := map[string]int{}
		for _, r := range s.Requests() {
			der, err := x509.MarshalPKIXPublicKey(r.Key)
			if err != nil {
				t.Fatal(err)
			}
			asked[string(der)]++
		}
		for key, times := range asked {
			if times != 1 {
				t.Errorf("key %x was certified %d times", key[len(key)-8:], times)
			}
		}
		for _, svid := range svids {
			der, err := x509.MarshalPKIXPublicKey(svid.PrivateKey.Public())
			if err != nil || asked[string(der)] != 1 {
				t.Errorf("%s has a key the agent did not have certified: %v", svid.ID, err)
			}
		}
	})
	t.Run("trust-05 no key is on disk or in the log", func(t *testing.T) {
		var secrets [][]byte
		for _, svid := range svids {
			_, key, err := svid.MarshalRaw()
			if err != nil {
				t.Fatal(err)
			}
			secrets = append(secrets, key)
		}
		secrets = append(secrets, []byte("PRIVATE KEY"))
		dir := filepath.Dir(filepath.Dir(cfg.Workloads[0].Socket))
		for _, root := range []string{dir, filepath.Dir(cfg.Workloads[0].TokenFile)} {
			err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				data, err := os.ReadFile(path)
				for _, secret := range secrets {
					if bytes.Contains(data, secret) {
						t.Errorf("%s holds a key", path)
					}
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
		for _, secret := range secrets {
			if bytes.Contains([]byte(n.logs.String()), secret) {
				t.Error("the log holds a key")
			}
		}
	})
}
