/*
 * one_process: the NIC, the library and a program as threads of one process, for ThreadSanitizer, which
 * sees no races between processes.
 *
 * The segments are mapped once and shared by all threads (mmap is wrapped at link time), so that the
 * sanitizer knows both sides' accesses for the same memory.  A node talks to itself, through its own NIC
 * and link: several connections at once, both directions, random sizes, every byte compared; many short
 * ones through one listener, accepted by several threads and ended in every way; then VMMC sends into an
 * exported buffer, with redirections posted and cancelled while they arrive.
 *
 *     one_process DIRECTORY SEED
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "socket.h"
#include "wait.h"
#include "vmmc.h"
#include "vmmc_attach.h"
#include "vmmc_layout.h"

enum { PAIRS = 3, ROUNDS = 60, MESSAGE = 96 * 1024, PORT = 7000, SENDS = 200, PARTS = 20, BUFFER = PARTS * 6553,
       CHURN = 120, CHURNERS = 3, CHURN_BYTES = 12000 };

static char prefix[64];
static uint64_t seed;

static void fail(const char *what) {
  fprintf(stderr, "one_process: %s: %s\n", what, strerror(errno));
  exit(1);
}
#define CHECK(condition) \
  do {                   \
    if (!(condition)) fail(#condition); \
  } while (0)

/* ---- one mapping of each segment ---- */

void *__real_mmap(void *, size_t, int, int, int, off_t);
int __real_munmap(void *, size_t);
static struct mapping { dev_t device; ino_t inode; void *base; size_t length; } mapping[32];
static int mappings;
static pthread_mutex_t mapping_lock = PTHREAD_MUTEX_INITIALIZER;

void *__wrap_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
  struct stat s;
  if (fd < 0 || !(flags & MAP_SHARED) || fstat(fd, &s) < 0)
    return __real_mmap(address, length, protection, flags, fd, offset);
  pthread_mutex_lock(&mapping_lock);
  void *base = NULL;
  for (int i = 0; i < mappings && !base; i++)
    if (mapping[i].inode == s.st_ino && mapping[i].device == s.st_dev) base = mapping[i].base;
  if (!base) { /* writable, whoever asks first */
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int writable = open(path, O_RDWR | O_CLOEXEC);
    CHECK(writable >= 0 && mappings < 32);
    base = __real_mmap(NULL, (size_t)s.st_size, PROT_READ | PROT_WRITE, flags, writable, 0);
    CHECK(base != MAP_FAILED);
    close(writable);
    mapping[mappings++] = (struct mapping){ s.st_dev, s.st_ino, base, (size_t)s.st_size };
  }
  pthread_mutex_unlock(&mapping_lock);
  return base;
}

int __wrap_munmap(void *address, size_t length);
int __wrap_munmap(void *address, size_t length) {
  for (int i = 0; i < mappings; i++)
    if (mapping[i].base == address) return 0;
  return __real_munmap(address, length);
}

/* ---- the daemon: one endpoint ---- */

int nic_main(int count, char **argument);

/* Signals of the process are for the NIC: its daemon's messages come with one, and its end. */
static void nic_signals(int how) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGIO);
  sigaddset(&set, SIGTERM);
  CHECK(pthread_sigmask(how, &set, NULL) == 0);
}

static void *run_nic(void *control) {
  nic_signals(SIG_UNBLOCK);
  char *argument[] = { "vmmc-nic", "--cluster", prefix, "--uid", "0", "--node", "0", "--nodes", "1", "--control", control, NULL };
  nic_main(11, argument);
  return NULL;
}

static int segment(const char *what, uint64_t bytes) {
  char name[128];
  snprintf(name, sizeof name, "/vmmc.0.%s.node0.%s", prefix, what);
  int fd = shm_open(name, O_RDWR | O_CREAT, 0600);
  CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
  return fd;
}

static int control[2];

static void serve(int program, uint32_t serial) {
  struct vmmc_attach_request request;
  CHECK(recv(program, &request, sizeof request, 0) == sizeof request && request.kind == VMMC_ATTACH);
  char what[32];
  int fd[3];
  snprintf(what, sizeof what, "ep%u.app", serial);
  fd[0] = segment(what, VMMC_APP_BYTES);
  snprintf(what, sizeof what, "ep%u.nic", serial);
  fd[1] = segment(what, VMMC_NIC_BYTES);
  snprintf(what, sizeof what, "ep%u.own", serial);
  close(segment(what, 64 << 20));
  fd[2] = segment("pub", sizeof(struct vmmc_pub));
  struct vmmc_control message = { VMMC_CONTROL_ATTACH, serial - 1, serial, getpid() };
  CHECK(send(control[0], &message, sizeof message, 0) == sizeof message);
  struct vmmc_attach_reply reply = { VMMC_MAGIC, 0, 0, 1, serial - 1, serial };
  char ancillary[CMSG_SPACE(sizeof fd)] = { 0 };
  struct iovec vector = { &reply, sizeof reply };
  struct msghdr header = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = ancillary, .msg_controllen = sizeof ancillary };
  struct cmsghdr *c = CMSG_FIRSTHDR(&header);
  c->cmsg_level = SOL_SOCKET;
  c->cmsg_type = SCM_RIGHTS;
  c->cmsg_len = CMSG_LEN(sizeof fd);
  memcpy(CMSG_DATA(c), fd, sizeof fd);
  CHECK(sendmsg(program, &header, 0) == sizeof reply);
  for (int i = 0; i < 3; i++) close(fd[i]);
}

static void *run_daemon(void *listener) {
  for (uint32_t serial = 1;; serial++) { /* an endpoint's connection stays open: it is its life */
    int program = accept(*(int *)listener, NULL, NULL);
    if (program < 0) return NULL;
    serve(program, serial);
  }
}

/* ---- the program ---- */

static uint64_t next(uint64_t *state) { /* xorshift64* (Vigna, 2016) */
  *state ^= *state >> 12, *state ^= *state << 25, *state ^= *state >> 27;
  return *state * 2685821657736338717u;
}
static char byte_at(uint64_t stream, uint64_t position) {
  uint64_t x = (position + 1) * 0x9e3779b97f4a7c15u ^ stream * 0xff51afd7ed558ccdu;
  return (char)(x >> 56);
}

struct side { struct vsocket *s; uint64_t stream, total; };

static void *write_side(void *argument) {
  struct side *side = argument;
  uint64_t state = seed * 77 + side->stream + 1, position = 0;
  char *block = malloc(MESSAGE);
  while (position < side->total) {
    uint64_t length = next(&state) % MESSAGE + 1;
    if (length > side->total - position) length = side->total - position;
    for (uint64_t i = 0; i < length; i++) block[i] = byte_at(side->stream, position + i);
    for (uint64_t done = 0; done < length;) {
      struct iovec vector = { block + done, length - done };
      ssize_t n = socket_send(side->s, &vector, 1, 0);
      if (n < 0) errno = (int)-n, fail("send");
      done += (uint64_t)n;
    }
    position += length;
  }
  int error = socket_shutdown(side->s, SHUT_WR);
  if (error) errno = -error, fail("shutdown");
  free(block);
  return NULL;
}

static void *read_side(void *argument) {
  struct side *side = argument;
  uint64_t state = seed * 99 + side->stream + 1, position = 0;
  char *block = malloc(MESSAGE);
  for (;;) {
    struct iovec vector = { block, next(&state) % MESSAGE + 1 };
    ssize_t n = socket_receive(side->s, &vector, 1, 0);
    if (n < 0) errno = (int)-n, fail("receive");
    if (!n) break;
    for (ssize_t i = 0; i < n; i++, position++)
      if (block[i] != byte_at(side->stream, position)) errno = EIO, fail("a byte differs");
  }
  if (position != side->total) errno = EIO, fail("bytes are missing");
  free(block);
  return NULL;
}

static void *run_pair(void *number) {
  uint64_t pair = (uintptr_t)number;
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)(PORT + pair)),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
  struct vsocket *listener = socket_new(AF_INET);
  CHECK(listener && socket_bind(listener, (void *)&address, sizeof address) == 0 && socket_listen(listener, 4) == 0);
  for (uint64_t round = 0; round < ROUNDS; round++) {
    struct vsocket *client = socket_new(AF_INET), *server;
    CHECK(client && socket_connect(client, (void *)&address, sizeof address, false) == 0);
    CHECK(socket_accept(listener, false, &server) == 0);
    uint64_t state = seed + round * PAIRS + pair + 1;
    struct side side[4];
    uint64_t there = next(&state) % (4 * MESSAGE), back = next(&state) % (4 * MESSAGE), stream = round * 10 + pair * 1000;
    side[0] = (struct side){ client, stream, there};
    side[1] = (struct side){ server, stream, there};
    side[2] = (struct side){ server, stream + 1, back };
    side[3] = (struct side){ client, stream + 1, back };
    pthread_t thread[4];
    for (int i = 0; i < 4; i++) pthread_create(&thread[i], NULL, i % 2 ? read_side : write_side, &side[i]);
    for (int i = 0; i < 4; i++) pthread_join(thread[i], NULL);
    socket_release(client);
    socket_release(server);
  }
  socket_release(listener);
  return NULL;
}

/* Churn: threads that connect, and threads that accept from one listener, non-blocking and by readiness.  A
 * connection is ended by either side, read to the end or not, so that slots are used again and again. */
static struct vsocket *shared_listener;
static _Atomic int accepted;

static bool acceptable(void *listener) { return socket_ready(listener) & EPOLLIN || atomic_load(&accepted) == CHURN; }
static bool readable(void *s) { return socket_ready(s) & (EPOLLIN | EPOLLHUP | EPOLLERR); }

/* Waits until ready(s), as a reader. */
static void wait_ready(struct vsocket *s, bool (*ready)(void *)) {
  struct wait_word words[SOCKET_WORDS];
  int error = wait_until(words, socket_wait_words(s, true, false, words), ready, s, WAIT_FOREVER,
                         wait_signals_now(), false);
  if (error) errno = -error, fail("wait_until");
}

/* Up to `most` bytes of the stream; true at its end, or when it broke. */
static bool read_upto(struct vsocket *s, uint64_t stream, uint64_t most) {
  char block[4096];
  for (uint64_t position = 0; position < most;) {
    struct iovec vector = { block, sizeof block < most - position ? sizeof block : most - position };
    ssize_t n = socket_receive(s, &vector, 1, MSG_DONTWAIT);
    if (n == -EAGAIN) {
      wait_ready(s, readable);
      continue;
    }
    if (n == 0 || n == -ECONNRESET || n == -EPIPE) return true;
    if (n < 0) errno = (int)-n, fail("receive");
    for (ssize_t i = 0; i < n; i++, position++)
      if (block[i] != byte_at(stream, position)) errno = EIO, fail("a byte differs");
  }
  return false;
}

static void write_churn(struct vsocket *s, uint64_t stream, uint64_t length) {
  char block[CHURN_BYTES];
  for (uint64_t i = 0; i < length; i++) block[i] = byte_at(stream, i);
  struct iovec vector = { block, length };
  ssize_t n = length ? socket_send(s, &vector, 1, 0) : 0;
  if (n < 0 && n != -EPIPE && n != -ECONNRESET) errno = (int)-n, fail("send");
}

/* One side of a connection: writes, reads all or a part or nothing, and closes. */
static void churn_side(struct vsocket *s, uint64_t *state, uint64_t writes, uint64_t reads) {
  uint64_t choice = next(state) % 4;
  write_churn(s, writes, next(state) % CHURN_BYTES);
  if (choice < 3) CHECK(socket_shutdown(s, SHUT_WR) <= 0); /* may be broken already */
  if (choice < 3) read_upto(s, reads, choice == 2 ? next(state) % CHURN_BYTES : UINT64_MAX);
  socket_release(s);
}

static void *accept_churn(void *number) {
  uint64_t state = seed * 31 + (uintptr_t)number + 1;
  while (atomic_load(&accepted) < CHURN) {
    struct vsocket *s;
    int error = socket_accept(shared_listener, true, &s);
    if (error == -EAGAIN) {
      wait_ready(shared_listener, acceptable);
      continue;
    }
    if (error) errno = -error, fail("accept");
    atomic_fetch_add(&accepted, 1);
    churn_side(s, &state, 2, 1);
  }
  return NULL;
}

static void *connect_churn(void *number) {
  uint64_t state = seed * 37 + (uintptr_t)number + 100;
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(PORT - 1),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
  for (int i = 0; i < CHURN / CHURNERS; i++) {
    struct vsocket *s = socket_new(AF_INET);
    int error = s ? socket_connect(s, (void *)&address, sizeof address, false) : -ENOMEM;
    if (error) errno = -error, fail("connect");
    churn_side(s, &state, 1, 2);
  }
  return NULL;
}

static void churn(void) {
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(PORT - 1),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
  pthread_t thread[2 * CHURNERS];
  shared_listener = socket_new(AF_INET);
  CHECK(shared_listener && socket_bind(shared_listener, (void *)&address, sizeof address) == 0);
  CHECK(socket_listen(shared_listener, 2) == 0);
  for (uintptr_t i = 0; i < 2 * CHURNERS; i++)
    pthread_create(&thread[i], NULL, i % 2 ? accept_churn : connect_churn, (void *)i);
  for (int i = 0; i < 2 * CHURNERS; i += 2) pthread_join(thread[i], NULL); /* all are connected, and accepted */
  struct vsocket *last = socket_new(AF_INET); /* wakes those who still wait to accept */
  while (atomic_load(&accepted) < CHURN) sched_yield();
  CHECK(socket_connect(last, (void *)&address, sizeof address, false) == 0);
  for (int i = 1; i < 2 * CHURNERS; i += 2) pthread_join(thread[i], NULL);
  socket_release(last);
  socket_release(shared_listener);
}

/* Sends into a buffer while its owner posts and cancels redirections: whatever the timing, each byte is
 * where redirect_end says. */
struct sender { struct vmmc_endpoint *endpoint; uint32_t import; char *source; };
static void *run_sender(void *argument) {
  struct sender *s = argument;
  for (int i = 0; i < PARTS; i++)
    CHECK(vmmc_send(s->endpoint, s->import, s->source + i * (BUFFER / PARTS), BUFFER / PARTS, (uint64_t)i * (BUFFER / PARTS), 0, 0, 10000) == 0);
  return NULL;
}

static void redirections(void) {
  struct vmmc_endpoint *e = vmmc_attach(NULL, -1);
  CHECK(e);
  char *buffer = vmmc_alloc(e, BUFFER), *target = vmmc_alloc(e, BUFFER), *source = vmmc_alloc(e, BUFFER);
  CHECK(buffer && target && source);
  int id = vmmc_export(e, buffer, BUFFER, "buffer", VMMC_WRITE, VMMC_ANYONE);
  struct vmmc_import import;
  CHECK(id >= 0 && vmmc_import(e, 0, "buffer", &import, 10000) == 0);
  uint64_t state = seed + 5;
  for (int round = 0; round < SENDS / PARTS; round++) {
    memset(buffer, 0, BUFFER);
    memset(target, 0, BUFFER);
    for (int i = 0; i < BUFFER; i++) source[i] = byte_at((uint64_t)round, (uint64_t)i) | 1;
    uint64_t from = next(&state) % BUFFER, length = next(&state) % (BUFFER - from) + 1;
    struct sender sender = { e, import.id, source };
    pthread_t thread;
    pthread_create(&thread, NULL, run_sender, &sender);
    CHECK(vmmc_redirect(e, id, from, length, target) == 0);
    for (uint64_t spin = next(&state) % 2000; spin; spin--) sched_yield();
    struct vmmc_redirected told;
    CHECK(vmmc_redirect_end(e, id, &told) == 0);
    pthread_join(thread, NULL);
    for (uint64_t i = 0; i < BUFFER; i++) {
      bool redirected = i >= told.from && i < told.to;
      char *place = redirected ? target + (i - from) : buffer + i;
      if (*place == source[i]) continue;
      fprintf(stderr, "round %d: byte %llu, posted [%llu, +%llu), told [%llu, %llu), found %d instead of %d\n", round,
              (unsigned long long)i, (unsigned long long)from, (unsigned long long)length,
              (unsigned long long)told.from, (unsigned long long)told.to, *place, source[i]);
      errno = EIO, fail("a byte is not where it was told");
    }
  }
  CHECK(vmmc_detach(e) == 0);
}

int main(int count, char **argument) {
  if (count != 3) return 2;
  seed = strtoull(argument[2], NULL, 10);
  snprintf(prefix, sizeof prefix, "one-process-%d", getpid());
  signal(SIGALRM, SIG_DFL);
  alarm(300); /* a hang ends, and fails */
  close(segment("pub", sizeof(struct vmmc_pub)));
  close(segment("door", sizeof(struct vmmc_door)));
  close(segment("state", 64 << 20));
  CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, control) == 0);
  char control_fd[12];
  snprintf(control_fd, sizeof control_fd, "%d", control[1]);
  pthread_t nic, daemon, pair[PAIRS];
  nic_signals(SIG_BLOCK);
  pthread_create(&nic, NULL, run_nic, control_fd);
  struct vmmc_control ready;
  CHECK(recv(control[0], &ready, sizeof ready, 0) == sizeof ready && ready.kind == VMMC_CONTROL_READY);

  struct sockaddr_un address = { .sun_family = AF_UNIX };
  snprintf(address.sun_path, sizeof address.sun_path, "%s/node0.sock", argument[1]);
  int listener = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  CHECK(bind(listener, (void *)&address, sizeof address) == 0 && listen(listener, 8) == 0);
  pthread_create(&daemon, NULL, run_daemon, &listener);
  setenv("VMMC_SOCKET", address.sun_path, 1);
  setenv("VMMC_CLUSTER", prefix, 1);
  setenv("VMMC_NODE", "node0", 1);
  setenv("VMMC_NODES", "1", 1);

  for (uintptr_t i = 0; i < PAIRS; i++) pthread_create(&pair[i], NULL, run_pair, (void *)i);
  for (int i = 0; i < PAIRS; i++) pthread_join(pair[i], NULL);
  churn();
  redirections();

  kill(getpid(), SIGTERM); /* the NIC's: it ends its duty cycle */
  pthread_join(nic, NULL);
  printf("every byte of %d connections and %d sends was where it belongs\n", PAIRS * ROUNDS + CHURN, SENDS);
  return 0;
}
