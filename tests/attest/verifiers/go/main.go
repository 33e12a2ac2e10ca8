// Judges quotes with go-tdx-guest: one JSON request a line on stdin, one JSON answer a line on stdout.
//
// A request names the quote and the root (hex), the time (Unix seconds), and either a PCS to ask over HTTP, or the
// collateral itself. The library's URLs are those of Intel's PCS; the getter asks elsewhere for their paths.
package main

import (
	"bufio"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/google/go-tdx-guest/verify"
)

type collateral struct {
	PckCrlIssuerChain     string `json:"pck_crl_issuer_chain"`
	RootCaCrl             string `json:"root_ca_crl"`
	PckCrl                string `json:"pck_crl"`
	TcbInfoIssuerChain    string `json:"tcb_info_issuer_chain"`
	TcbInfo               string `json:"tcb_info"`
	TcbInfoSignature      string `json:"tcb_info_signature"`
	QeIdentityIssuerChain string `json:"qe_identity_issuer_chain"`
	QeIdentity            string `json:"qe_identity"`
	QeIdentitySignature   string `json:"qe_identity_signature"`
}

type request struct {
	Quote      string      `json:"quote"`
	Root       string      `json:"root"`
	Now        int64       `json:"now"`
	Pcs        string      `json:"pcs"`
	Collateral *collateral `json:"collateral"`
}

type answer struct {
	Accepted bool   `json:"accepted"`
	Status   string `json:"status,omitempty"`
	Error    string `json:"error,omitempty"`
}

type pcsGetter struct{ base string }

func (g pcsGetter) Get(address string) (map[string][]string, []byte, error) {
	parsed, err := url.Parse(address)
	if err != nil {
		return nil, nil, err
	}
	reply, err := http.Get(g.base + parsed.RequestURI())
	if err != nil {
		return nil, nil, err
	}
	defer reply.Body.Close()
	if reply.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("%s: status %d", address, reply.StatusCode)
	}
	body, err := io.ReadAll(reply.Body)
	return reply.Header, body, err
}

type givenGetter struct{ c *collateral }

func (g givenGetter) Get(address string) (map[string][]string, []byte, error) {
	header := func(name, chain string) map[string][]string {
		return map[string][]string{name: {url.QueryEscape(chain)}}
	}
	signed := func(name, text, signature string) []byte {
		return []byte(fmt.Sprintf(`{"%s":%s,"signature":"%s"}`, name, text, signature))
	}
	c := g.c
	switch {
	case strings.Contains(address, "/pckcrl"):
		body, err := hex.DecodeString(c.PckCrl)
		return header("Sgx-Pck-Crl-Issuer-Chain", c.PckCrlIssuerChain), body, err
	case strings.Contains(address, "/tcb?"):
		return header("Tcb-Info-Issuer-Chain", c.TcbInfoIssuerChain),
			signed("tcbInfo", c.TcbInfo, c.TcbInfoSignature), nil
	case strings.Contains(address, "/qe/identity"):
		return header("Sgx-Enclave-Identity-Issuer-Chain", c.QeIdentityIssuerChain),
			signed("enclaveIdentity", c.QeIdentity, c.QeIdentitySignature), nil
	default:
		body, err := hex.DecodeString(c.RootCaCrl)
		return nil, body, err
	}
}

func judge(line []byte) (result answer) {
	defer func() {
		if problem := recover(); problem != nil {
			result = answer{Error: fmt.Sprintf("panic: %v", problem)}
		}
	}()
	var r request
	if err := json.Unmarshal(line, &r); err != nil {
		return answer{Error: "request: " + err.Error()}
	}
	quote, err := hex.DecodeString(r.Quote)
	if err != nil {
		return answer{Error: "request: " + err.Error()}
	}
	der, err := hex.DecodeString(r.Root)
	if err != nil {
		return answer{Error: "request: " + err.Error()}
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return answer{Error: "request: " + err.Error()}
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	options := verify.DefaultOptions()
	options.CheckRevocations = true
	options.GetCollateral = true
	options.TrustedRoots = roots
	options.Now = time.Unix(r.Now, 0)
	if r.Collateral != nil {
		options.Getter = givenGetter{r.Collateral}
	} else {
		options.Getter = pcsGetter{r.Pcs}
	}
	if err := verify.RawTdxQuote(quote, options); err != nil {
		return answer{Error: err.Error()}
	}
	return answer{Accepted: true, Status: "UpToDate"}
}

func main() {
	in := bufio.NewReaderSize(os.Stdin, 1<<20)
	out := bufio.NewWriter(os.Stdout)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		reply, _ := json.Marshal(judge(line))
		out.Write(append(reply, '\n'))
		out.Flush()
	}
}
