// SPDX-License-Identifier: Apache-2.0

package peer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Lifetimes of what an Authority makes.
const (
	authorityLife   = 20 * 365 * 24 * time.Hour
	certificateLife = 5 * 365 * 24 * time.Hour
)

// Authority signs the certificates of a shard's nodes. It belongs on no node.
type Authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// NewAuthority makes one, and returns its certificate and key as PEM.
func NewAuthority(now time.Time) (a *Authority, certificate, key []byte, err error) {
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "Fairlead shard"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("make the authority's key: %w", err)
	}
	if certificate, key, err = sign(template, template, private, private); err != nil {
		return nil, nil, nil, err
	}
	a, err = ParseAuthority(certificate, key)
	return a, certificate, key, err
}

// ParseAuthority reads what NewAuthority returned.
func ParseAuthority(certificate, key []byte) (*Authority, error) {
	c, k := decodePEM(certificate), decodePEM(key)
	if c == nil || k == nil {
		return nil, errors.New("the authority's certificate or key is no PEM")
	}
	parsed, err := x509.ParseCertificate(c)
	if err != nil {
		return nil, fmt.Errorf("read the authority's certificate: %w", err)
	}
	private, err := x509.ParsePKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("read the authority's key: %w", err)
	}
	signer, ok := private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("the authority's key is no ECDSA key")
	}
	return &Authority{parsed, signer}, nil
}

// Issue makes a certificate that names a node, and its key, as PEM.
func (a *Authority) Issue(node string, now time.Time) (certificate, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make the key of node %s: %w", node, err)
	}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: node}, DNSNames: []string{node},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(certificateLife), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	return sign(template, a.certificate, private, a.key)
}

func sign(template, parent *x509.Certificate, private, signer *ecdsa.PrivateKey) (certificate, key []byte, err error) {
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return nil, nil, fmt.Errorf("make a serial number: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &private.PublicKey, signer)
	if err != nil {
		return nil, nil, fmt.Errorf("sign a certificate: %w", err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, fmt.Errorf("write a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), nil
}

func decodePEM(text []byte) []byte {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil
	}
	return block.Bytes
}
