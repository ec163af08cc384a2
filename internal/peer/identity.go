// SPDX-License-Identifier: Apache-2.0

package peer

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
)

// Identity is who this agent is to others, and whom it believes.
type Identity struct {
	certificate tls.Certificate
	pool        *x509.CertPool
}

// LoadIdentity reads a certificate that names this node, its key, and the
// certificate of the authority that all nodes' are signed by.
func LoadIdentity(certificate, key, authority string) (*Identity, error) {
	pair, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("read the certificate %s and its key %s: %w; make them with `fairlead keys`", certificate, key, err)
	}
	text, err := os.ReadFile(authority)
	if err != nil {
		return nil, fmt.Errorf("read the authority's certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s: holds no certificate; name the ca.crt that `fairlead keys` made", authority)
	}
	return &Identity{pair, pool}, nil
}

// Name returns the node that the identity names.
func (i *Identity) Name() string {
	if leaf := i.certificate.Leaf; leaf != nil {
		return named(leaf)
	}
	return ""
}

func named(c *x509.Certificate) string {
	if len(c.DNSNames) != 1 {
		return ""
	}
	return c.DNSNames[0]
}

// server demands a certificate of a node that may ask.
func (i *Identity) server(mayAsk func(node string) bool) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{i.certificate},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: i.pool,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || !mayAsk(named(s.PeerCertificates[0])) {
				return errors.New("the client's certificate names no LB node of this shard")
			}
			return nil
		},
	}
}

// client believes the node of this name alone.
func (i *Identity) client(node string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{i.certificate}, RootCAs: i.pool, ServerName: node}
}
