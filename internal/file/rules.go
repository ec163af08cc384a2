// SPDX-License-Identifier: Apache-2.0

package file

import "fairlead.dev/fairlead/internal/lb"

func errorRule(code, title, remedy string) *lb.Rule {
	return &lb.Rule{Code: code, Severity: lb.Error, Title: title, Remedy: remedy}
}

func warningRule(code, title, remedy string) *lb.Rule {
	return &lb.Rule{Code: code, Severity: lb.Warning, Title: title, Remedy: remedy}
}

// The kinds of findings. Codes are stable and never used again.
var (
	unreadable    = errorRule("FL0001", "a file or directory cannot be read", "correct the path or its rights")
	notYAML       = errorRule("FL0002", "a file is not YAML, or not an object", "correct the syntax at this line")
	tooLarge      = errorRule("FL0003", "a file is larger than 64 MiB", "split it")
	hasAlias      = errorRule("FL0004", "a file uses YAML anchors or aliases", "write the value out")
	unknownKind   = errorRule("FL0005", "a kind of object that is not known", "use Service (v1), EndpointSlice (discovery.k8s.io/v1), or Node, AddressPool, ServicePolicy (fairlead.dev/v1alpha1)")
	unknownField  = errorRule("FL0006", "a field that this kind of object does not have", "remove it, or correct its spelling")
	wrongType     = errorRule("FL0007", "a value of the wrong type", "write a value of the type that the field has")
	duplicate     = errorRule("FL0008", "two objects of the same kind and name", "remove or rename one")
	noName        = errorRule("FL0009", "an object without a name", "set metadata.name")
	duplicateKey  = errorRule("FL0010", "a key that stands twice in one object", "remove one")
	badAddress    = errorRule("FL0101", "not an address, or one that cannot be used here", "write a plain unicast IPv4 or IPv6 address")
	badPrefix     = errorRule("FL0102", "not a prefix or range of addresses", "write e.g. 192.0.2.0/24, 2001:db8::1-2001:db8::ff, or one address")
	badPort       = errorRule("FL0103", "a port out of range", "write a number from 1 to 65535")
	badRole       = errorRule("FL0104", "a role that is not known, or none", "use LoadBalancer, Backend, or both")
	badTunnel     = errorRule("FL0105", "tunnel addresses that cannot be used", "give one address of each family at most, and at least one")
	badPolicy     = errorRule("FL0106", "a value that a ServicePolicy cannot have", "correct it as the message says")
	overlap       = errorRule("FL0107", "addresses that two objects claim", "give each address to one of them")
	badProtocol   = errorRule("FL0201", "a protocol that is not balanced", "use TCP or UDP")
	noPorts       = errorRule("FL0202", "a Service without ports", "add spec.ports")
	duplicatePort = errorRule("FL0203", "a VIP, port and protocol that two Services claim", "change the port or the address of one")
	noVIP         = warningRule("FL0204", "a Service without an address", "set status.loadBalancer.ingress, or the annotation fairlead.dev/addresses")
	outsidePools  = errorRule("FL0205", "a VIP that lies in no AddressPool", "add it to an AddressPool, or use an address of one")
	portNames     = errorRule("FL0206", "ports of a Service that are not named apart", "give each port a name of its own")
	badAffinity   = errorRule("FL0207", "a session affinity that a Service cannot have", "use ClientIP with 1 to 86400 seconds, or None")
	rangesOpen    = warningRule("FL0208", "a VIP is open to all clients, though the Service has source ranges of the other family", "add ranges of its family; as with kube-proxy, a family without any is not filtered")
	wrongFamily   = errorRule("FL0301", "an address of another family than its EndpointSlice says", "put it into an EndpointSlice of its own family")
	noSuchService = warningRule("FL0302", "an EndpointSlice or ServicePolicy of a Service that is not known", "add the Service, or correct the name (label kubernetes.io/service-name, or spec.targetRefs)")
	unsafe        = warningRule("FL0303", "an endpoint that must not be a backend", "correct the endpoint; until then it gets nothing")
	portsDiffer   = warningRule("FL0304", "an endpoint's port differs from the Service's in mode IPIP", "let the server listen on the Service's port: it holds the VIP, and nothing translates")
	noEndpoints   = warningRule("FL0305", "a port of a Service that no endpoint has", "name the port in the EndpointSlice as in the Service")
)

// Rules are all kinds of findings of this package.
var Rules = []*lb.Rule{unreadable, notYAML, tooLarge, hasAlias, unknownKind, unknownField, wrongType, duplicate, noName, duplicateKey,
	badAddress, badPrefix, badPort, badRole, badTunnel, badPolicy, overlap,
	badProtocol, noPorts, duplicatePort, noVIP, outsidePools, portNames, badAffinity, rangesOpen,
	wrongFamily, noSuchService, unsafe, portsDiffer, noEndpoints}
