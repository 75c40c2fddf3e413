package server

import (
	"sync/atomic"
	"testing"
	"time"
)

// TestBudgetIsFair: a large request that waits is not overtaken by small ones.
func TestBudgetIsFair(t *testing.T) {
	b := newBudget(10, 100)
	var never atomic.Bool
	if !b.tryTake(60) {
		t.Fatal("60 of 100 were refused")
	}
	large := make(chan bool)
	go func() { large <- b.take(80, &never) }()
	for b.waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
	if b.tryTake(1) {
		t.Fatal("a small request overtook a large one that waits")
	}
	b.put(60)
	if !<-large {
		t.Fatal("the large request was refused")
	}
	if !b.tryTake(20) || b.tryTake(1) {
		t.Fatal("the budget does not add up")
	}
	b.put(20)
	b.put(80)
	for range 10 {
		if !b.tryTake(0) {
			t.Fatal("fewer requests than allowed")
		}
	}
	if b.tryTake(0) {
		t.Fatal("more requests than allowed")
	}
}

// TestBudgetStops: those who are told to stop leave the queue, and the others move up.
func TestBudgetStops(t *testing.T) {
	b := newBudget(10, 100)
	b.tryTake(100)
	var stop, never atomic.Bool
	first, second := make(chan bool), make(chan bool)
	go func() { first <- b.take(100, &stop) }()
	for b.waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
	go func() { second <- b.take(50, &never) }()
	for b.waiting() == 1 {
		time.Sleep(time.Millisecond)
	}
	stop.Store(true)
	b.wake()
	if <-first {
		t.Fatal("a request was granted that nothing was free for")
	}
	b.put(100)
	if !<-second {
		t.Fatal("the second in the queue was refused")
	}
}

func (b *budget) waiting() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.next - b.serving
}
