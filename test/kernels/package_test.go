// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// A kernel is unpacked from a Debian package, not installed.
type kernel struct {
	image   string   // path of vmlinuz
	modules []string // paths, in the order in which they are to be inserted
}

// modulesNeeded are those that a dataplane on veths needs, in order.
var modulesNeeded = []string{"veth", "sch_ingress", "cls_bpf"}

var imageDependency = regexp.MustCompile(`(?m)^ *Depends: (linux-image-\S+)$`)

// fetch returns the newest kernel that a Debian metapackage stands for. Lists
// may name a package that the archive has replaced since; then newer ones are
// fetched.
func fetch(metapackage string) (kernel, error) {
	k, err := fetchListed(metapackage)
	if err == nil {
		return k, nil
	}
	if out, updateErr := exec.Command("apt-get", "update", "-qq").CombinedOutput(); updateErr != nil {
		return kernel{}, fmt.Errorf("%w; update the package lists: %w: %s", err, updateErr, out)
	}
	return fetchListed(metapackage)
}

// fetchListed takes a package once unpacked from the cache.
func fetchListed(metapackage string) (kernel, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return kernel{}, fmt.Errorf("find the cache: %w", err)
	}
	cache = filepath.Join(cache, "fairlead", "kernels")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return kernel{}, fmt.Errorf("make the cache: %w", err)
	}
	name, err := resolve(metapackage)
	if err != nil {
		return kernel{}, err
	}
	dir := filepath.Join(cache, name)
	if _, err := os.Stat(dir); err != nil {
		if err := unpack(name, cache); err != nil {
			return kernel{}, err
		}
	}
	return find(dir)
}

// resolve names the package that a metapackage depends on.
func resolve(metapackage string) (string, error) {
	out, err := exec.Command("apt-cache", "depends", metapackage).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("look up %s: %w: %s", metapackage, err, out)
	}
	match := imageDependency.FindSubmatch(out)
	if match == nil {
		return "", fmt.Errorf("look up %s: no kernel among its dependencies: %s", metapackage, out)
	}
	return string(match[1]), nil
}

// unpack downloads a package and unpacks it to cache/name, or leaves nothing.
func unpack(name, cache string) error {
	work, err := os.MkdirTemp(cache, "unpack-*")
	if err != nil {
		return fmt.Errorf("unpack %s: %w", name, err)
	}
	defer os.RemoveAll(work)
	// The directory is not readable by apt's own user.
	download := exec.Command("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name)
	download.Dir = work
	if out, err := download.CombinedOutput(); err != nil {
		return fmt.Errorf("download %s: %w: %s", name, err, out)
	}
	packages, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(packages) != 1 {
		return fmt.Errorf("download %s: want one package, have %q (%w)", name, packages, err)
	}
	root := filepath.Join(work, "root")
	if out, err := exec.Command("dpkg-deb", "--extract", packages[0], root).CombinedOutput(); err != nil {
		return fmt.Errorf("extract %s: %w: %s", packages[0], err, out)
	}
	if err := os.Rename(root, filepath.Join(cache, name)); err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	return nil
}

// find locates the image and the modules in an unpacked package.
func find(dir string) (kernel, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return kernel{}, fmt.Errorf("find the image in %s: want one, have %q (%w)", dir, images, err)
	}
	found := map[string]string{}
	err = filepath.WalkDir(filepath.Join(dir, "lib", "modules"), func(path string, _ os.DirEntry, err error) error {
		if module, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok {
			found[module] = path
		}
		return err
	})
	if err != nil {
		return kernel{}, fmt.Errorf("list the modules of %s: %w", dir, err)
	}
	k := kernel{image: images[0]}
	for _, module := range modulesNeeded {
		path, ok := found[module]
		if !ok {
			return kernel{}, fmt.Errorf("find module %s in %s: not there", module, dir)
		}
		k.modules = append(k.modules, path)
	}
	return k, nil
}
