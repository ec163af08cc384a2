// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// An archive is an initramfs: cpio's "newc" format, uncompressed.
type archive struct {
	w       *bufio.Writer
	offset  int
	inode   int
	present map[string]bool // directories
}

const (
	directoryMode = 0o040755
	fileMode      = 0o100755
	deviceMode    = 0o020600
)

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriter(w), present: map[string]bool{".": true, "": true}}
}

// addFile copies a file of this machine to an absolute path of the archive.
func (a *archive) addFile(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("read %s: %w", from, err)
	}
	a.add(to, data)
	return nil
}

// add puts a file, and the directories above it, into the archive.
func (a *archive) add(to string, data []byte) {
	to = strings.TrimPrefix(path.Clean(to), "/")
	a.addDirectory(path.Dir(to))
	a.entry(to, fileMode, 0, 0, data)
}

func (a *archive) addDirectory(dir string) {
	if a.present[dir] {
		return
	}
	a.present[dir] = true
	a.addDirectory(path.Dir(dir))
	a.entry(dir, directoryMode, 0, 0, nil)
}

// close ends the archive. It reports the first error of any write before.
func (a *archive) close() error {
	// Without a console the kernel gives init no standard output.
	a.addDirectory("dev")
	a.entry("dev/console", deviceMode, 5, 1, nil)
	a.entry("TRAILER!!!", 0, 0, 0, nil)
	if err := a.w.Flush(); err != nil {
		return fmt.Errorf("write the initramfs: %w", err)
	}
	return nil
}

func (a *archive) entry(name string, mode, major, minor int, data []byte) {
	a.inode++
	// Magic, inode, mode, uid, gid, links, mtime, size, device (2), the
	// device that it is (2), length of the name with its zero, checksum.
	a.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name))
	a.write(data)
}

// write pads what it writes to four bytes, as every part of an entry is. A
// bufio.Writer keeps its first error, so it is asked for it once, at the end.
func (a *archive) write(data []byte) {
	a.w.Write(data)
	for a.offset += len(data); a.offset%4 != 0; a.offset++ {
		a.w.WriteByte(0)
	}
}
