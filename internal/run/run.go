// SPDX-License-Identifier: Apache-2.0

// Package run starts and stops long-lived work. It is the only package that
// starts goroutines: everything else is called by a task, blocks, and returns
// when its context ends.
package run

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
)

// Task is one long-lived piece of work. It returns nil, or the context's
// error, when the context has ended.
type Task struct {
	Name string
	Run  func(ctx context.Context) error
}

// All runs the tasks until each has returned. The first that returns, with or
// without an error, ends the others. The result joins the tasks' errors, each
// with its task's name; the end of the context is no error. A panic becomes
// the error of its task, so the others are still stopped in order.
func All(ctx context.Context, tasks ...Task) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan error, len(tasks))
	for _, t := range tasks {
		go func() { results <- t.run(ctx) }()
	}
	var errs []error
	for range tasks {
		if err := <-results; err != nil {
			errs = append(errs, err)
		}
		cancel()
	}
	return errors.Join(errs...)
}

// Each calls work for each of n pieces, at most limit at a time, and waits for
// all of them. A panic ends the program, as it would in the caller.
func Each(n, limit int, work func(i int)) {
	var workers sync.WaitGroup
	next := make(chan int)
	for range min(n, limit) {
		workers.Go(func() {
			for i := range next {
				work(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	workers.Wait()
}

func (t Task) run(ctx context.Context) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: panic: %v\n%s", t.Name, p, debug.Stack())
		}
	}()
	err = t.Run(ctx)
	if err == nil || (ctx.Err() != nil && errors.Is(err, ctx.Err())) {
		return nil
	}
	return fmt.Errorf("%s: %w", t.Name, err)
}
