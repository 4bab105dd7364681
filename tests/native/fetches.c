/*
 * fetches: what the firmware, compiled with -fsanitize=thread, calls before each of its loads: here instead of
 * the sanitizer's functions, with a word to before_fetch (fuzz.c), which may change what is about to be loaded.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

void before_fetch(void *address, size_t size);

void __tsan_init(void);
void __tsan_init(void) {}
void __tsan_func_entry(void *);
void __tsan_func_entry(void *caller) { (void)caller; }
void __tsan_func_exit(void);
void __tsan_func_exit(void) {}

#define ACCESS(bytes)                                                          \
  void __tsan_read##bytes(void *);                                             \
  void __tsan_read##bytes(void *at) { before_fetch(at, bytes); }               \
  void __tsan_write##bytes(void *);                                            \
  void __tsan_write##bytes(void *at) { (void)at; }                             \
  void __tsan_unaligned_read##bytes(void *);                                   \
  void __tsan_unaligned_read##bytes(void *at) { before_fetch(at, bytes); }     \
  void __tsan_unaligned_write##bytes(void *);                                  \
  void __tsan_unaligned_write##bytes(void *at) { (void)at; }                   \
  void __tsan_volatile_read##bytes(void *);                                    \
  void __tsan_volatile_read##bytes(void *at) { before_fetch(at, bytes); }      \
  void __tsan_volatile_write##bytes(void *);                                   \
  void __tsan_volatile_write##bytes(void *at) { (void)at; }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)

void __tsan_read_range(void *, size_t);
void __tsan_read_range(void *at, size_t size) { before_fetch(at, size); }
void __tsan_write_range(void *, size_t);
void __tsan_write_range(void *at, size_t size) { (void)at, (void)size; }

/* Sequentially consistent, whatever was asked for: stronger, and one definition. */
#define ATOMIC(bits)                                                                                              \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t *, int);                                \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t *at, int order) {                       \
    (void)order, before_fetch((void *)(uintptr_t)at, bits / 8);                                                   \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                               \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t *, uint##bits##_t, int);                               \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t *at, uint##bits##_t value, int order) {                \
    (void)order, __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t *, uint##bits##_t, int);                  \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t *at, uint##bits##_t value, int order) {   \
    return (void)order, __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                         \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t *, uint##bits##_t, int);                 \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t *at, uint##bits##_t value, int order) {  \
    return (void)order, __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                          \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_fetch_or(volatile uint##bits##_t *, uint##bits##_t, int);                  \
  uint##bits##_t __tsan_atomic##bits##_fetch_or(volatile uint##bits##_t *at, uint##bits##_t value, int order) {   \
    return (void)order, __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);                                           \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_fetch_and(volatile uint##bits##_t *, uint##bits##_t, int);                 \
  uint##bits##_t __tsan_atomic##bits##_fetch_and(volatile uint##bits##_t *at, uint##bits##_t value, int order) {  \
    return (void)order, __atomic_fetch_and(at, value, __ATOMIC_SEQ_CST);                                          \
  }
ATOMIC(8) ATOMIC(16) ATOMIC(32) ATOMIC(64)

void __tsan_atomic_thread_fence(int);
void __tsan_atomic_thread_fence(int order) { (void)order, __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int);
void __tsan_atomic_signal_fence(int order) { (void)order, __atomic_signal_fence(__ATOMIC_SEQ_CST); }
