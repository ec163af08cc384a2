// SPDX-License-Identifier: Apache-2.0

package health

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

const (
	grpcMethod = "/grpc.health.v1.Health/Check"
	maxAnswer  = 4 << 10 // of a HealthCheckResponse, which needs 2 bytes
	frameHead  = 5
)

// checkGRPC asks grpc.health.v1.Health over HTTP/2 without TLS. It closes the
// connection.
func checkGRPC(ctx context.Context, conn net.Conn, probe lb.Probe, limit time.Duration) string {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	var taken atomic.Bool
	transport := &http.Transport{
		Protocols: &protocols, DisableCompression: true, MaxResponseHeaderBytes: maxHeaders,
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: 64 << 10, MaxReceiveBufferPerStream: 64 << 10},
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			if taken.Swap(true) {
				return nil, errors.New("the connection was refused to the request")
			}
			return conn, nil
		},
	}
	defer transport.CloseIdleConnections()
	defer conn.Close() // ends the transport's goroutines
	response, err := transport.RoundTrip(newGRPCRequest(ctx, probe))
	if err != nil {
		return problem("request", err, limit)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return judgeCode(response.StatusCode, []lb.CodeRange{{From: http.StatusOK, To: http.StatusOK}})
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return problem("response", err, limit)
	}
	if len(body) > maxAnswer {
		return fmt.Sprintf("response: more than %d KiB", maxAnswer>>10)
	}
	return judgeGRPC(response.Header, response.Trailer, body)
}

func newGRPCRequest(ctx context.Context, probe lb.Probe) *http.Request {
	frame := frameOf(appendService(nil, probe.Check.GRPCService))
	request := &http.Request{
		Method: http.MethodPost, URL: &url.URL{Scheme: "http", Host: probe.Address.String(), Path: grpcMethod}, Host: probe.Check.Host,
		Header: http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}, "User-Agent": {userAgent}},
		Body:   io.NopCloser(bytes.NewReader(frame)), ContentLength: int64(len(frame)),
	}
	return request.WithContext(ctx)
}

// appendService writes a HealthCheckRequest: field 1, the service.
func appendService(b []byte, service string) []byte {
	if service == "" {
		return b
	}
	b = append(b, 1<<3|2)
	b = binary.AppendUvarint(b, uint64(len(service)))
	return append(b, service...)
}

// frameOf puts gRPC's head before a message: not compressed, and its length.
func frameOf(message []byte) []byte {
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	return append(frame, message...)
}

// judgeGRPC says what is wrong with an answer; "": nothing. A server that has
// no message to send gives its status among the headers.
func judgeGRPC(header, trailer http.Header, body []byte) string {
	from := trailer
	if from.Get("Grpc-Status") == "" {
		from = header
	}
	switch status := from.Get("Grpc-Status"); {
	case status == "":
		return "response: no gRPC status"
	case status != "0":
		return line(fmt.Sprintf("gRPC status %s: %s", status, from.Get("Grpc-Message")))
	}
	serving, err := readStatus(body)
	if err != nil {
		return "response: " + err.Error()
	}
	names := []string{"UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"}
	switch {
	case serving == 1:
		return ""
	case serving < uint64(len(names)):
		return fmt.Sprintf("%s, want SERVING", names[serving])
	}
	return fmt.Sprintf("serving status %d, want SERVING", serving)
}

var errAnswer = errors.New("no HealthCheckResponse")

// readStatus reads a framed HealthCheckResponse: field 1, the serving status.
// What else there may be is skipped.
func readStatus(b []byte) (status uint64, err error) {
	if len(b) < frameHead || b[0] != 0 || uint64(binary.BigEndian.Uint32(b[1:])) != uint64(len(b)-frameHead) {
		return 0, errAnswer
	}
	for b = b[frameHead:]; len(b) > 0; {
		tag, n := binary.Uvarint(b)
		if n <= 0 {
			return 0, errAnswer
		}
		value, size := field(b[n:], tag&7)
		if size < 0 {
			return 0, errAnswer
		}
		if tag == 1<<3 { // field 1, a varint
			status = value
		}
		b = b[n+size:]
	}
	return status, nil
}

// field returns the value of a protobuf field if it is a varint, and the
// field's size; -1: it is cut off or of no known type.
func field(b []byte, kind uint64) (value uint64, size int) {
	fixed := 0
	switch kind {
	case 0:
		value, n := binary.Uvarint(b)
		if n <= 0 {
			return 0, -1
		}
		return value, n
	case 1:
		fixed = 8
	case 2:
		length, n := binary.Uvarint(b)
		if n <= 0 || length > uint64(len(b)-n) {
			return 0, -1
		}
		return 0, n + int(length)
	case 5:
		fixed = 4
	default:
		return 0, -1
	}
	if len(b) < fixed {
		return 0, -1
	}
	return 0, fixed
}
