/*
 * mortal: a NIC that dies, by SIGKILL, before any store whatever.
 *
 * The firmware is compiled with -fsanitize=thread, which puts a call before each of its loads and stores,
 * and linked with these functions instead of the sanitizer's.  Each process counts down from a number of
 * stores that it draws at its start, small ones as often as large ones, so that some die while they recover.
 *
 * Copies of payload are such points, too, every few pages (memcpy, pwrite; linked with --wrap).
 *
 * MORTAL_TURNS: a file with a number, at first 0.  A NIC of the name MORTAL_NIC takes it and leaves it one higher;
 * with it as n it dies at the n-th of these points that comes once it begins to copy payload, or to say what there is
 * to be copied (stream_transmit), and else not.  So each step of sending, copying and acknowledging is a NIC's last
 * one in its turn, up to MORTAL_MOST of them.
 * Without it:
 * MORTAL_SEED: with the process id, what it draws from.  MORTAL_LIVES: the exponent of the most stores.
 * MORTAL_UNTIL: those that start after this second live.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

extern const char stream_transmit[]; /* a function of the NIC's; here its address is all that counts */

static uint64_t left;

static void may_die(void) {
  if (left && --left == 0) kill(getpid(), SIGKILL);
}

static void take_turn(void) {
  static bool taken;
  const char *turns = getenv("MORTAL_TURNS"), *who = getenv("MORTAL_NIC"), *most = getenv("MORTAL_MOST");
  char name[16] = "";
  if (taken || !turns || !who || !most) return;
  taken = true;
  prctl(PR_GET_NAME, name);
  int fd = strcmp(name, who) ? -1 : open(turns, O_RDWR);
  if (fd < 0) return;
  uint64_t *number = mmap(NULL, sizeof *number, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (number == MAP_FAILED) return;
  uint64_t n = __atomic_add_fetch(number, 1, __ATOMIC_SEQ_CST);
  if (n <= (uint64_t)atoll(most)) left = n;
}

enum { PAYLOAD = 1024, PIECE = 8192 };

void *__real_memcpy(void *, const void *, size_t);
void *__wrap_memcpy(void *, const void *, size_t);
void *__wrap_memcpy(void *to, const void *from, size_t length) {
  if (length < PAYLOAD) return __real_memcpy(to, from, length);
  take_turn();
  for (size_t at = 0; at < length; at += PIECE) {
    may_die();
    __real_memcpy((char *)to + at, (const char *)from + at, length - at < PIECE ? length - at : PIECE);
  }
  may_die();
  return to;
}

ssize_t __real_pwrite(int, const void *, size_t, off_t);
ssize_t __wrap_pwrite(int, const void *, size_t, off_t);
ssize_t __wrap_pwrite(int fd, const void *from, size_t length, off_t at) {
  if (length >= PAYLOAD) take_turn();
  may_die();
  ssize_t written = __real_pwrite(fd, from, length < PIECE ? length : PIECE, at); /* less than was asked for may be */
  may_die();
  return written;
}

static uint64_t mix(uint64_t x) { /* splitmix64 */
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

void __tsan_init(void);
void __tsan_init(void) {
  static bool drawn;
  const char *seed = getenv("MORTAL_SEED"), *lives = getenv("MORTAL_LIVES"),
             *until = getenv("MORTAL_UNTIL");
  if (getenv("MORTAL_TURNS")) return;
  if (drawn || (until && time(NULL) > atoll(until))) return;
  drawn = true;
  uint64_t random = mix(mix((uint64_t)(seed ? atoll(seed) : 0)) ^ (uint64_t)getpid());
  uint64_t exponent = 6 + random % (uint64_t)((lives ? atoi(lives) : 20) - 6);
  left = (1ull << exponent) + mix(random) % (1ull << exponent);
}

void __tsan_func_entry(void *);
void __tsan_func_entry(void *caller) {
  enum { PROLOGUE = 64 };
  (void)caller;
  uintptr_t within = (uintptr_t)__builtin_return_address(0), sends = (uintptr_t)stream_transmit;
  if (within - sends < PROLOGUE) take_turn();
}
void __tsan_func_exit(void);
void __tsan_func_exit(void) {}

#define ACCESS(size)                                              \
  void __tsan_read##size(void *);                                 \
  void __tsan_read##size(void *at) { (void)at; }                  \
  void __tsan_write##size(void *);                                \
  void __tsan_write##size(void *at) { (void)at, may_die(); }      \
  void __tsan_unaligned_read##size(void *);                       \
  void __tsan_unaligned_read##size(void *at) { (void)at; }        \
  void __tsan_unaligned_write##size(void *);                      \
  void __tsan_unaligned_write##size(void *at) { (void)at, may_die(); } \
  void __tsan_volatile_read##size(void *);                        \
  void __tsan_volatile_read##size(void *at) { (void)at; }         \
  void __tsan_volatile_write##size(void *);                       \
  void __tsan_volatile_write##size(void *at) { (void)at, may_die(); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)

void __tsan_read_range(void *, size_t);
void __tsan_read_range(void *at, size_t size) { (void)at, (void)size; }
void __tsan_write_range(void *, size_t);
void __tsan_write_range(void *at, size_t size) { (void)at, (void)size, may_die(); }

/* Sequentially consistent, whatever was asked for: stronger, and one definition. */
#define ATOMIC(bits)                                                                                              \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t *, int);                                \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t *at, int order) {                       \
    return (void)order, __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                               \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t *, uint##bits##_t, int);                               \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t *at, uint##bits##_t value, int order) {                \
    (void)order, may_die(), __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t *, uint##bits##_t, int);                  \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t *at, uint##bits##_t value, int order) {   \
    (void)order, may_die();                                                                                       \
    uint##bits##_t found = __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                      \
    return may_die(), found;                                                                                      \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t *, uint##bits##_t, int);                 \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t *at, uint##bits##_t value, int order) {  \
    return (void)order, may_die(), __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                               \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_fetch_or(volatile uint##bits##_t *, uint##bits##_t, int);                  \
  uint##bits##_t __tsan_atomic##bits##_fetch_or(volatile uint##bits##_t *at, uint##bits##_t value, int order) {   \
    return (void)order, may_die(), __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);                                \
  }
ATOMIC(8) ATOMIC(16) ATOMIC(32) ATOMIC(64)

void __tsan_atomic_thread_fence(int);
void __tsan_atomic_thread_fence(int order) { (void)order, __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int);
void __tsan_atomic_signal_fence(int order) { (void)order, may_die(); }
