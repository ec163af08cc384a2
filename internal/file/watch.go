// SPDX-License-Identifier: Apache-2.0

package file

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// quiet is how long nothing must happen before a change is told: editors
	// and tools write a file in several steps.
	quiet = 10 * time.Millisecond
	// patience is the longest that a change waits for quiet.
	patience = 250 * time.Millisecond
	// poll is for what no event tells of: network file systems, and paths whose
	// parents do not exist yet.
	poll = 10 * time.Second
)

// Watch calls changed after something about the paths may have changed, until
// ctx ends. It watches directories, since files are replaced by renaming, and
// ConfigMaps by moving a link. Too many calls do no harm.
func Watch(ctx context.Context, paths []string, changed func()) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch files: %w", err)
	}
	defer watcher.Close()
	rewatch(watcher, paths)
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	settled := time.NewTimer(time.Hour)
	settled.Stop()
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-watcher.Events:
			if since.IsZero() {
				since = time.Now()
			}
			if time.Since(since) < patience {
				settled.Reset(quiet)
			}
		case <-watcher.Errors: // an overflow: look at everything
			settled.Reset(quiet)
		case <-settled.C:
			since = time.Time{}
			rewatch(watcher, paths)
			changed()
		case <-ticker.C:
			rewatch(watcher, paths)
			changed()
		}
	}
}

// rewatch watches each path and its directory, as far as they exist.
func rewatch(watcher *fsnotify.Watcher, paths []string) {
	for _, path := range paths {
		for _, each := range []string{path, filepath.Dir(path)} {
			_ = watcher.Add(each) // a path that is missing is found by polling
		}
	}
}
