// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// maxProblem is the most of a Problem, in bytes: parts come from the network.
const maxProblem = 240

// fault is an error of this node: there was no probe.
type fault struct{ error }

func (f fault) Unwrap() error { return f.error }

// isFault says whether an error is this node's, as when it has no descriptors,
// memory or ports left. Backends must not be found unhealthy for that.
func isFault(err error) bool {
	if _, ok := errors.AsType[fault](err); ok {
		return true
	}
	errno, ok := errors.AsType[unix.Errno](err)
	if !ok {
		return false
	}
	switch errno {
	case unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.EADDRNOTAVAIL, unix.EAGAIN:
		return true
	}
	return false
}

// problem says what an error at some stage of a probe means, in one line.
func problem(stage string, err error, timeout time.Duration) string {
	if network, ok := errors.AsType[net.Error](err); errors.Is(err, context.DeadlineExceeded) || ok && network.Timeout() {
		return timedOut(timeout)
	}
	if invalid, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return line(certificate(invalid))
	}
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return stage + ": " + errno.Error()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return stage + ": the connection was closed"
	}
	return line(stage + ": " + err.Error())
}

func timedOut(after time.Duration) string { return fmt.Sprintf("timeout after %s", after) }

func certificate(invalid *tls.CertificateVerificationError) string {
	name := "of nobody"
	if len(invalid.UnverifiedCertificates) > 0 {
		leaf := invalid.UnverifiedCertificates[0]
		name = leaf.Subject.String()
		if len(leaf.DNSNames) > 0 {
			name = leaf.DNSNames[0]
		}
	}
	return fmt.Sprintf("certificate %s: %s", name, strings.TrimPrefix(invalid.Err.Error(), "x509: "))
}

// line makes one clear line of a text that may be hostile.
func line(text string) string {
	if len(text) > maxProblem {
		text = strings.ToValidUTF8(text[:maxProblem], "") + "..."
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
}
