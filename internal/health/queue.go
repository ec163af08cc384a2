// SPDX-License-Identifier: Apache-2.0

package health

import "time"

// item is something that waits for a time.
type item[T any] struct {
	at     time.Time
	of     T
	index  int
	queued bool
}

// queue is items, the earliest first; a heap for container/heap.
type queue[T any] []*item[T]

func (q queue[T]) Len() int           { return len(q) }
func (q queue[T]) Less(i, j int) bool { return q[i].at.Before(q[j].at) }

func (q queue[T]) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *queue[T]) Push(x any) {
	i := x.(*item[T])
	i.index, i.queued = len(*q), true
	*q = append(*q, i)
}

func (q *queue[T]) Pop() any {
	last := len(*q) - 1
	i := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	i.queued = false
	return i
}
