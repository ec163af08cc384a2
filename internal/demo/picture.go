// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"strings"
	"time"

	"fairlead.dev/fairlead/internal/status"
)

const barWidth = 24

// animate redraws the picture in place while the load runs. Where that is not
// possible it draws nothing: the last picture is drawn anyway.
func (d *Demo) animate(ctx context.Context) {
	ticker := time.NewTicker(150 * time.Millisecond)
	defer ticker.Stop()
	for drawn := false; ; {
		select {
		case <-ctx.Done():
			if drawn {
				d.rewind()
			}
			return
		case <-ticker.C:
		}
		if !d.Live {
			continue
		}
		documents, err := d.documents()
		if err != nil {
			continue // it is asked again at the end
		}
		if drawn {
			d.rewind()
		}
		d.draw(documents)
		drawn = true
	}
}

// rewind goes back to the first line of the picture and clears what follows.
func (d *Demo) rewind() { fmt.Fprintf(d.Out, "\x1b[%dA\x1b[J", len(d.net.AllPods())+2) }

// draw shows the TCP connections of each Pod by LB node, as the agents' maps
// have counted them.
func (d *Demo) draw(documents []status.Document) {
	head := fmt.Sprintf("\n%-12s", "connections")
	counts := map[string][]uint64{}
	for i, document := range documents {
		head += fmt.Sprintf("%8s", document.Node)
		for _, s := range document.Services {
			if s.Protocol != "TCP" {
				continue
			}
			for _, b := range s.Backends {
				if counts[b.Address] == nil {
					counts[b.Address] = make([]uint64, len(documents))
				}
				counts[b.Address][i] += b.Connections
			}
		}
	}
	fmt.Fprintln(d.Out, head+"     all")
	for _, pod := range d.net.AllPods() {
		line, all := fmt.Sprintf("%-12s", pod.Label), uint64(0)
		for i := range documents {
			sum := uint64(0)
			for _, address := range []string{fmt.Sprintf("%s:8080", pod.Address4), fmt.Sprintf("[%s]:8080", pod.Address6)} {
				if row := counts[address]; row != nil {
					sum += row[i]
				}
			}
			all += sum
			line += fmt.Sprintf("%8d", sum)
		}
		bar := strings.Repeat("#", min(barWidth, int(all*barWidth/(2*2*connections/uint64(len(d.net.AllPods()))))))
		fmt.Fprintf(d.Out, "%s%8d  %s\n", line, all, bar)
	}
}
