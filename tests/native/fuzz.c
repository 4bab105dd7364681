/*
 * fuzz: a program that writes anything into its segment, and the firmware that serves it, in one process.
 *
 * An input is a list of steps, each a few bytes: proper ones (take a slot, bind, connect, send, export …) and
 * improper ones (any value at any place, a position that goes back, a segment cut short), with turns of the
 * NIC between them.  The node talks to itself over its own link.  An honest program is on it as well: it
 * listens, exports a window, and has a stream to itself.  After each input
 *   - the NIC must come to rest, although nobody waits for it: what never ends is a defect;
 *   - the honest program's stream has every byte, and its memory outside the window is as it was;
 *   - the hostile program is detached, and nothing of it is left.
 * Everything else is the sanitizers' to find.
 *
 *     fuzz SEED SECONDS        random inputs until the time is over; says how to repeat what it finds
 *     fuzz SEED SECONDS CASE   only that one of them
 *     fuzz NAME                what was found before, by name; all: all of it
 *
 * With -DLIBFUZZER it is a libFuzzer target (clang -fsanitize=fuzzer), to be run with -close_fd_mask=2; an input
 * that it found is repeated by naming its file.  With -DFETCHES the firmware is compiled
 * with -fsanitize=thread, whose calls before each load change the hostile segment there (fetches.c): what is
 * read twice is read differently.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "../../nodes/nic/nic.h"

enum {
  HONEST = 0, HOSTILE = 1, /* endpoint indices */
  PORT = 80,               /* the honest program listens there */
  WINDOW = 16 * VMMC_PAGE, WINDOW_BYTES = 16 * VMMC_PAGE, HONEST_HEAP = 64 * VMMC_PAGE,
  SEVERAL = 8,             /* slots of each kind that the hostile program mostly uses */
  REST_TURNS = 60000,      /* of the NIC, until it has to be at rest */
  INPUT_MAX = 1000,
};

static char prefix[64];
static uint64_t seed;
static struct {
  uint64_t current; /* case */
  uint32_t serial;  /* of the newest endpoint */
} *shared;
static int control[2], waker_pipe[2];
static char *honest, *hostile; /* their .app segments */
static const char *hostile_nic;
static int hostile_fd = -1;
static bool truncated, stepping;

/* Standard error is the firmware's log, kept in memory and shown when something was found. */
static int said = 2;
void __sanitizer_set_report_fd(void *fd) __attribute__((weak));
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

static void fail(const char *what) {
  dprintf(said, "fuzz: %s\n", what);
  abort();
}
#define CHECK(condition) \
  do {                   \
    if (!(condition)) fail(#condition); \
  } while (0)

#ifdef LIBFUZZER
static struct { const uint8_t *data; size_t size; } newest; /* input: libFuzzer keeps none whose end we report */

static void keep_input(void) {
  char name[40];
  snprintf(name, sizeof name, "failing-input-%d", getpid());
  int file = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (file < 0 || write(file, newest.data, newest.size) != (ssize_t)newest.size) _exit(3);
  close(file);
}
#else
static void keep_input(void) {} /* its number is enough */
#endif

static void say_where(int signal_number) {
  keep_input();
  char text[160];
  int n = snprintf(text, sizeof text, "fuzz: in case %llu of seed %llu%s\n", (unsigned long long)shared->current,
                   (unsigned long long)seed, signal_number == SIGALRM ? ": a turn of the NIC does not end" : "");
  if (write(said, text, (size_t)n) < 0) _exit(3);
  char log[4096];
  ssize_t length = said == 2 ? 0 : pread(2, log, sizeof log, 0);
  if (length > 0 && write(said, log, (size_t)length) < 0) _exit(3);
  signal(SIGABRT, SIG_DFL);
  if (signal_number) abort();
}

static void died(void) { say_where(0); }

/* ---- what the NIC remembers of a program, with nothing behind it that any index of 32 bits could reach ---- */

enum { REACH_GIB = 2048 };

void *__real_mmap(void *, size_t, int, int, int, off_t);
int __real_munmap(void *, size_t);
void *__wrap_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
  if (length != OWN_BYTES || !(flags & MAP_SHARED)) return __real_mmap(address, length, protection, flags, fd, offset);
  address = __real_mmap(NULL, (size_t)REACH_GIB << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(address != MAP_FAILED);
  return __real_mmap(address, length, protection, flags | MAP_FIXED, fd, offset);
}

int __wrap_munmap(void *address, size_t length);
int __wrap_munmap(void *address, size_t length) {
  return __real_munmap(address, length == OWN_BYTES ? (size_t)REACH_GIB << 30 : length);
}

/* ---- the daemon's part ---- */

static int segment(const char *what, uint64_t bytes) {
  char name[128];
  snprintf(name, sizeof name, "/vmmc.0.%s.node0.%s", prefix, what);
  int fd = shm_open(name, O_RDWR | O_CREAT, 0600);
  CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
  return fd;
}

static void remove_segment(const char *what) {
  char name[128];
  snprintf(name, sizeof name, "/vmmc.0.%s.node0.%s", prefix, what);
  shm_unlink(name);
}

static const char *part(uint32_t of, const char *what) {
  static char name[40];
  snprintf(name, sizeof name, "ep%u.%s", of, what);
  return name;
}

static int tell_one(uint32_t kind, uint32_t index, uint32_t of, int32_t value, int fd) {
  struct vmmc_control message = { kind, index, of, value };
  char ancillary[CMSG_SPACE(sizeof fd)] = { 0 };
  struct iovec vector = { &message, sizeof message };
  struct msghdr header = { .msg_iov = &vector, .msg_iovlen = 1 };
  if (fd >= 0) {
    header.msg_control = ancillary;
    header.msg_controllen = sizeof ancillary;
    struct cmsghdr *c = CMSG_FIRSTHDR(&header);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
  }
  return sendmsg(control[0], &header, MSG_DONTWAIT) == sizeof message;
}

static char *attach(uint32_t index, int *app_fd, const char **nic_out) {
  uint32_t serial = ++shared->serial;
  int app = segment(part(serial, "app"), VMMC_APP_BYTES), own = segment(part(serial, "own"), OWN_BYTES);
  int fd = segment(part(serial, "nic"), VMMC_NIC_BYTES);
  CHECK(posix_fallocate(app, 0, 5 * VMMC_PAGE) == 0 && posix_fallocate(fd, 0, 5 * VMMC_PAGE) == 0);
  char *base = mmap(NULL, VMMC_APP_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, app, 0);
  const char *base_nic = mmap(NULL, VMMC_NIC_BYTES, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
  CHECK(base != MAP_FAILED && base_nic != MAP_FAILED);
  close(fd);
  close(own);
  *app_fd = app;
  *nic_out = base_nic;
  CHECK(tell_one(VMMC_CONTROL_ATTACH, index, serial, getpid(), -1));
  raise(SIGIO);
  return base;
}

/* ---- the NIC, until it rests ---- */

static void turns(int most) {
  struct vmmc_control heard;
  for (int i = 0; i < most; i++) {
    alarm(10);
    nic_turn();
    while (recv(control[0], &heard, sizeof heard, MSG_DONTWAIT) > 0) continue;
  }
}

static void rest(void) {
  struct vmmc_control heard;
  bool steps = stepping;
  stepping = false;
  for (int i = 0, idle = 0; idle < 2; i++) {
    if (i == REST_TURNS) fail("the NIC does not come to rest");
    alarm(10);
    idle = nic_turn() ? 0 : idle + 1;
    while (recv(control[0], &heard, sizeof heard, MSG_DONTWAIT) > 0) continue;
  }
  bool work = endpoints_have_work() || links_have_work();
  if (work) fail("the NIC rests, and says that there is work");
  stepping = steps;
}

/* ---- both programs' part: what the library does ---- */

static struct vmmc_app_slot *app(char *base, uint32_t slot) { return (struct vmmc_app_slot *)(base + VMMC_APP_SLOTS) + slot; }
static const struct vmmc_nic_slot *nic_of(const char *base, uint32_t slot) {
  return (const struct vmmc_nic_slot *)(base + VMMC_NIC_SLOTS) + slot;
}

static void ring(char *base, uint32_t slot) {
  struct vmmc_app_header *header = (void *)base;
  _Atomic uint64_t *dirty = (_Atomic uint64_t *)(base + VMMC_APP_DIRTY);
  atomic_fetch_or(&dirty[slot / 64 % VMMC_DIRTY_WORDS], 1ull << slot % 64);
  atomic_fetch_or(&header->summary[slot / 4096 % VMMC_SUMMARY_WORDS], 1ull << slot / 64 % 64);
}

static struct vmmc_address at(uint16_t port) {
  struct vmmc_address a = { .ip = { [10] = 0xff, [11] = 0xff, [12] = 198, [13] = 18, [15] = 1 }, .port = port, .family = AF_INET };
  return a;
}

static void request(char *base, uint32_t slot, uint32_t op, uint16_t port, uint16_t flags, uint32_t backlog) {
  struct vmmc_app_slot *a = app(base, slot);
  a->op = op;
  a->bind_flags = flags;
  a->peer_node = 0;
  a->local = at(op == VMMC_REQUEST_CONNECT ? 0 : port);
  a->peer = at(port);
  a->backlog = backlog;
  atomic_fetch_add(&a->request, 1);
  ring(base, slot);
}

static void take(char *base, uint32_t slot, uint32_t generation) {
  struct vmmc_app_slot *a = app(base, slot);
  a->written = a->consumed = a->post = 0;
  a->shut = 0;
  atomic_store(&a->generation, generation);
  ring(base, slot);
}

static void post(char *base, const struct vmmc_command *given) {
  struct vmmc_command c = *given;
  struct vmmc_app_header *header = (void *)base;
  uint64_t tail = header->command_tail;
  c.index = tail;
  ((struct vmmc_command *)(base + VMMC_APP_COMMANDS))[tail % VMMC_COMMANDS] = c;
  atomic_store(&header->command_tail, tail + 1);
}

/* ---- the honest program ---- */

static const char *honest_nic;
static uint64_t honest_sent, honest_read;
enum { LISTENER = 0, CLIENT = 1, STREAM_PORT = 81, STREAM_LISTENER = 2 };
static uint32_t stream_slot = VMMC_SLOTS;
static char heap[HONEST_HEAP]; /* as its memory outside the window has to be */

static char byte_at(uint64_t position) { return (char)((position * 0x9e3779b97f4a7c15u) >> 56); }

/* Of a listener that wants nothing more: whoever was accepted is sent away. */
static void send_away_from(uint32_t listener) {
  const struct vmmc_nic_slot *n = nic_of(honest_nic, listener);
  struct vmmc_app_slot *a = app(honest, listener);
  for (uint64_t end = n->placed; a->consumed < end; a->consumed += sizeof(struct vmmc_accept_entry)) {
    struct vmmc_accept_entry entry;
    memcpy(&entry, honest_nic + VMMC_NIC_RINGS + listener * (uint64_t)VMMC_RING + a->consumed % VMMC_RING, sizeof entry);
    take(honest, entry.slot, entry.generation);
    app(honest, entry.slot)->shut = VMMC_CLOSED | VMMC_ABORT;
  }
  ring(honest, listener);
}

/* At the port of its own stream as well: a request that was scribbled over may have asked for that one. */
static void send_away(void) {
  send_away_from(LISTENER);
  send_away_from(STREAM_LISTENER);
}

static void start_honest(void) {
  int fd;
  honest = attach(HONEST, &fd, &honest_nic);
  close(fd);
  rest();
  for (uint32_t slot = 0; slot < 3; slot++) take(honest, slot, 1);
  request(honest, LISTENER, VMMC_REQUEST_LISTEN, PORT, 0, 4);
  request(honest, STREAM_LISTENER, VMMC_REQUEST_LISTEN, STREAM_PORT, 0, 4);
  rest();
  request(honest, CLIENT, VMMC_REQUEST_CONNECT, STREAM_PORT, 0, 0);
  rest();
  CHECK(nic_of(honest_nic, CLIENT)->state == VMMC_ESTABLISHED);
  struct vmmc_accept_entry entry;
  memcpy(&entry, honest_nic + VMMC_NIC_RINGS + STREAM_LISTENER * (uint64_t)VMMC_RING, sizeof entry);
  app(honest, STREAM_LISTENER)->consumed += sizeof entry;
  stream_slot = entry.slot;
  take(honest, stream_slot, entry.generation);
  memset(honest + VMMC_APP_UTLB, VMMC_UTLB_VALID, HONEST_HEAP / VMMC_PAGE);
  for (uint64_t i = 0; i < HONEST_HEAP; i++) heap[i] = byte_at(i);
  memcpy(honest + VMMC_APP_HEAP, heap, HONEST_HEAP);
  post(honest, &(struct vmmc_command){ .op = VMMC_OP_EXPORT, .export_id = 0, .offset = WINDOW, .length = WINDOW_BYTES,
                                         .permissions = VMMC_PERMIT_READ | VMMC_PERMIT_WRITE, .node = VMMC_ANY_NODE, .name = "window" });
  post(honest, &(struct vmmc_command){ .op = VMMC_OP_EXPORT, .export_id = 1, .offset = WINDOW + WINDOW_BYTES, .length = WINDOW_BYTES,
                                         .permissions = VMMC_PERMIT_READ, .node = VMMC_ANY_NODE, .name = "read-only" });
  rest();
}

static void honest_writes(uint32_t length) {
  struct vmmc_app_slot *a = app(honest, CLIENT);
  if (honest_sent != honest_read) return;
  for (uint32_t i = 0; i < length; i++)
    honest[VMMC_APP_RINGS + CLIENT * (uint64_t)VMMC_RING + (honest_sent + i) % VMMC_RING] = byte_at(honest_sent + i);
  honest_sent += length;
  atomic_store(&a->written, honest_sent);
  ring(honest, CLIENT);
}

static void honest_reads(void) {
  uint64_t placed = nic_of(honest_nic, stream_slot)->placed;
  CHECK(placed <= honest_sent);
  for (; honest_read < placed; honest_read++)
    if (honest_nic[VMMC_NIC_RINGS + stream_slot * (uint64_t)VMMC_RING + vmmc_ring_offset(honest_read, nic_of(honest_nic, stream_slot)->ring_base)] != byte_at(honest_read))
      fail("a byte of the honest stream is wrong");
  atomic_store(&app(honest, stream_slot)->consumed, honest_read);
  ring(honest, stream_slot);
}

static void check_honest(void) {
  honest_reads();
  rest();
  honest_writes(1000);
  rest();
  honest_reads();
  CHECK(honest_read == honest_sent);
  if (memcmp(honest + VMMC_APP_HEAP, heap, WINDOW) ||
      memcmp(honest + VMMC_APP_HEAP + WINDOW + WINDOW_BYTES, heap + WINDOW + WINDOW_BYTES, HONEST_HEAP - WINDOW - WINDOW_BYTES))
    fail("the honest program's memory was written");
}

/* ---- the hostile program ---- */

struct input {
  const uint8_t *at, *end;
};

static uint64_t number(struct input *in, int bytes) {
  uint64_t value = 0;
  for (; bytes && in->at < in->end; bytes--) value = value << 8 | *in->at++;
  return value;
}

/* Values with which something may be about to go wrong. */
static uint64_t value(struct input *in, uint64_t now, uint64_t other) {
  uint64_t pick = number(in, 1);
  switch (pick % 16) {
    case 0: return 0;
    case 1: return now + 1;
    case 2: return now - 1;
    case 3: return UINT64_MAX - pick;
    case 4: return UINT32_MAX;
    case 5: return other;
    case 6: return other + 1;
    case 7: return other - 1;
    case 8: return 1ull << number(in, 1) % 64;
    case 9: return now + VMMC_RING;
    case 10: return VMMC_HEAP_BYTES - number(in, 2);
    case 11: return number(in, 2) * VMMC_PAGE;
    case 12: return number(in, 8);
    case 13: return now + number(in, 2);
    default: return number(in, 1);
  }
}

static uint32_t some_slot(struct input *in) {
  uint32_t pick = (uint32_t)number(in, 1);
  if (pick < 150) return pick % (pick < 75 ? SEVERAL / 2 : SEVERAL);
  if (pick < 240) return VMMC_ACTIVE_SLOTS + pick % (pick < 200 ? 3 : SEVERAL);
  if (pick == 240) return (uint32_t)number(in, 2) % VMMC_SLOTS; /* seldom: many pages are committed for a high one */
  return (uint32_t)number(in, 1) + (pick % 2 ? 0 : VMMC_ACTIVE_SLOTS);
}

static void put(uint64_t offset, uint64_t what, int bytes) {
  offset &= ~(uint64_t)(bytes - 1);
  if (offset + 8 > VMMC_APP_BYTES) return;
  if (bytes == 8)
    atomic_store((_Atomic uint64_t *)(hostile + offset), what);
  else
    atomic_store((_Atomic uint32_t *)(hostile + offset), (uint32_t)what);
}

static uint64_t look(const char *base, uint64_t offset) { return *(const volatile uint64_t *)(base + (offset & ~7ull)); }

/* Any field of a slot, near what it was or near what the NIC has there. */
static void scribble_slot(struct input *in) {
  uint32_t slot = some_slot(in);
  uint64_t in_slot = number(in, 1) % sizeof(struct vmmc_app_slot), offset = VMMC_APP_SLOTS + slot * sizeof(struct vmmc_app_slot) + in_slot;
  uint64_t other = look(hostile_nic, VMMC_NIC_SLOTS + slot * sizeof(struct vmmc_nic_slot) + number(in, 1));
  put(offset, value(in, look(hostile, offset), other), number(in, 1) % 2 ? 8 : 4);
}

static void plausible_command(struct input *in) {
  struct vmmc_command c = { .op = (uint32_t)number(in, 1) % 8, .flags = (uint32_t)number(in, 1) % 5, .node = 0 };
  static const char *names[] = { "", "window", "read-only", "mine", "other" };
  c.offset = number(in, 1) * (VMMC_PAGE / 2);
  c.length = number(in, 1) % 4 ? number(in, 2) * 16 : value(in, 0, VMMC_HEAP_BYTES);
  c.remote_offset = number(in, 1) % 2 ? 0 : value(in, 0, WINDOW_BYTES);
  c.import_id = (uint32_t)number(in, 1) % 6;
  c.export_id = (uint32_t)number(in, 1) % 4;
  c.permissions = (uint32_t)number(in, 1) % 5;
  strcpy(c.name, names[number(in, 1) % 5]);
  if (number(in, 1) % 8 == 0) c.notify_length = value(in, c.length, c.remote_offset);
  if (number(in, 1) % 16 == 0) c.node = (uint32_t)value(in, 0, 1);
  if (number(in, 1) % 16 == 0) c.import_id = (uint32_t)value(in, 0, VMMC_EXPORTS);
  if (number(in, 1) % 16 == 0) c.export_id = (uint32_t)value(in, 0, VMMC_EXPORTS);
  if (number(in, 1) % 8 == 0) c.node = VMMC_ANY_NODE;
  post(hostile, &c);
}

static void redirect(struct input *in) {
  uint64_t place = number(in, 1) % 2 ? VMMC_APP_EXPORTS + number(in, 1) % 4 * sizeof(struct vmmc_app_export)
                                     : VMMC_APP_SLOTS + some_slot(in) * sizeof(struct vmmc_app_slot) + offsetof(struct vmmc_app_slot, post);
  put(place + 8, number(in, 1) % 4 ? number(in, 2) * 8 : value(in, 0, VMMC_HEAP_BYTES), 8);
  put(place + 16, number(in, 1) % 4 ? number(in, 2) : value(in, 0, VMMC_HEAP_BYTES), 8);
  put(place + 24, value(in, 0, number(in, 2)), 8);
  put(place, value(in, look(hostile, place), 1), 8);
}

static void header(struct input *in) {
  struct vmmc_app_header *h = (void *)hostile;
  switch (number(in, 1) % 8) {
    case 0: h->command_tail = value(in, h->command_tail, ((const struct vmmc_nic_header *)(const void *)hostile_nic)->commands_taken); break;
    case 1: h->events_taken = value(in, h->events_taken, ((const struct vmmc_nic_header *)(const void *)hostile_nic)->events); break;
    case 2: h->notifications_taken = value(in, h->notifications_taken, ((const struct vmmc_nic_header *)(const void *)hostile_nic)->notifications); break;
    case 3: h->group[number(in, 1) % VMMC_GROUPS].wakers = value(in, 0, 7); break;
    case 4: h->group[number(in, 1) % VMMC_GROUPS].asleep = (uint32_t)number(in, 1); break;
    case 5: h->asleep_completion = h->asleep_notification = (uint32_t)number(in, 1); break;
    case 6: h->summary[number(in, 1) % VMMC_SUMMARY_WORDS] = value(in, 0, 0); break;
    default: put(VMMC_APP_DIRTY + number(in, 2) % (VMMC_DIRTY_WORDS * 8), value(in, 0, 0), 8);
  }
}

static void give_waker(struct input *in) {
  int fd = number(in, 1) % 4 ? eventfd((unsigned)number(in, 1), EFD_NONBLOCK) : dup(waker_pipe[1]);
  tell_one(VMMC_CONTROL_WAKER, HOSTILE, shared->serial, (int32_t)number(in, 1) % 70, fd);
  close(fd);
  raise(SIGIO);
}

static void step(struct input *in) {
  static const uint32_t ops[] = { VMMC_REQUEST_BIND, VMMC_REQUEST_LISTEN, VMMC_REQUEST_CONNECT, VMMC_REQUEST_CONNECT };
  static const uint16_t ports[] = { PORT, 7000, 7000, 7001, 7001, 0, 33000 };
  uint32_t slot = some_slot(in), kind = (uint32_t)number(in, 1) % 64;
  const struct vmmc_nic_slot *n = nic_of(hostile_nic, slot);
  struct vmmc_app_slot *a = app(hostile, slot);
  if (kind < 8) {
    turns((int)number(in, 1) % 6 + 1);
    return;
  }
  if (truncated) return;
  if (kind < 16) {
    take(hostile, slot, n->state == VMMC_FREE ? n->generation + 1 : n->generation);
    if (slot >= VMMC_ACTIVE_SLOTS) a->generation = n->generation;
  } else if (kind < 26) {
    request(hostile, slot, ops[number(in, 1) % 4], ports[number(in, 1) % 7], number(in, 1) % 8, (uint32_t)number(in, 1));
  } else if (kind < 32) { /* writes as much as it may, or a little more */
    a->written += number(in, 1) % 4 ? number(in, 2) % VMMC_FIRST_WINDOW : value(in, 0, 1);
    ring(hostile, slot);
  } else if (kind < 36) {
    uint64_t how = number(in, 1);
    a->consumed = how % 4 ? n->placed : how % 8 ? value(in, a->consumed, n->placed) : a->consumed + how / 8 % 32;
    ring(hostile, slot);
  } else if (kind < 40) {
    uint32_t how = (uint32_t)number(in, 1);
    a->shut |= how < 128 ? VMMC_CLOSED : how % 32;
    ring(hostile, slot);
  } else if (kind < 46) {
    plausible_command(in);
  } else if (kind < 48) {
    memset(hostile + VMMC_APP_UTLB, (int)number(in, 1) % 2, (size_t)number(in, 1) + 64);
  } else if (kind < 50) {
    memset(hostile + VMMC_APP_UTLB, VMMC_UTLB_VALID, number(in, 1) % 8 ? 1024 : VMMC_HEAP_PAGES);
  } else if (kind < 54) {
    scribble_slot(in);
    ring(hostile, slot);
  } else if (kind < 56) {
    redirect(in);
  } else if (kind < 59) {
    header(in);
  } else if (kind == 59) {
    put(number(in, 4) % VMMC_APP_UTLB, value(in, 0, 0), 8);
  } else if (kind == 60) {
    a->watch = value(in, 0, 3);
    a->asleep_rx = a->asleep_tx = (uint32_t)number(in, 1) % 2;
  } else if (kind == 61) {
    give_waker(in);
  } else if (kind == 62) {
    honest_writes((uint32_t)number(in, 2) % 4000 + 1);
    honest_reads();
    send_away();
  } else if (number(in, 1) % 16 == 0) { /* its own memory goes away */
    CHECK(ftruncate(hostile_fd, (off_t)(number(in, 1) % 3 * VMMC_PAGE * 600)) == 0);
    truncated = true;
  }
}

/* Where most programs are after a while: random steps from nothing seldom come so far. */
static void begin(struct input *in) {
  uint64_t with = number(in, 1);
  if (with & 1) { /* a stream to itself, one more connection that waits to be accepted, a redirection posted */
    for (uint32_t slot = 0; slot < 4; slot++) take(hostile, slot, 1);
    request(hostile, 0, VMMC_REQUEST_LISTEN, 7000, 0, 8);
    rest();
    for (uint32_t slot = 1; slot < 4; slot++) request(hostile, slot, VMMC_REQUEST_CONNECT, 7000, 0, 0);
    rest();
    take(hostile, VMMC_ACTIVE_SLOTS, nic_of(hostile_nic, VMMC_ACTIVE_SLOTS)->generation);
    app(hostile, 0)->consumed = sizeof(struct vmmc_accept_entry);
    memset(hostile + VMMC_APP_UTLB, VMMC_UTLB_VALID, 64);
    struct vmmc_app_slot *a = app(hostile, VMMC_ACTIVE_SLOTS);
    a->redirect_length = number(in, 1) * 8;
    a->redirect_position = number(in, 1);
    a->post = 1;
    ring(hostile, 0);
  }
  if (with & 2) /* sockets that share a port */
    for (uint32_t slot = 4; slot < 7; slot++) {
      take(hostile, slot, 1);
      request(hostile, slot, VMMC_REQUEST_BIND, 7001, with & 4 ? VMMC_BIND_REUSEPORT : VMMC_BIND_REUSEADDR, 0);
    }
  if (with & 8) { /* exports of its own, imports of its own and of the other's */
    static const char *names[] = { "mine", "other", "window", "read-only" };
    memset(hostile + VMMC_APP_UTLB, VMMC_UTLB_VALID, 256);
    for (uint32_t i = 0; i < 4; i++) {
      struct vmmc_command c = { .op = VMMC_OP_EXPORT, .export_id = i, .offset = i * WINDOW, .length = WINDOW_BYTES,
                                .permissions = i + 1, .node = VMMC_ANY_NODE };
      strcpy(c.name, names[i]);
      if (i < 2) post(hostile, &c);
      c.op = VMMC_OP_IMPORT;
      c.node = 0;
      post(hostile, &c);
    }
  }
  rest();
}

static void say_open(const struct endpoint *e) {
  for (uint32_t slot = 0; slot < VMMC_SLOTS; slot++) {
    if (slot == e->own->active_end && slot < VMMC_ACTIVE_SLOTS) slot = VMMC_ACTIVE_SLOTS;
    if (slot == e->own->passive_end && slot >= VMMC_ACTIVE_SLOTS) break;
    const struct connection *c = &e->own->connection[slot];
    if (c->state == CONNECTION_NONE) continue;
    dprintf(said, "fuzz: slot %u: state %u, flags %#x, port %u to %u of slot %u (endpoint %u), transmitted %llu,"
                  " acknowledged %llu, may %llu, placed %llu, told %llu\n",
            slot, c->state, c->flags, c->local.port, c->peer.port, c->far.slot, c->far.endpoint,
            (unsigned long long)c->transmitted, (unsigned long long)c->acknowledged, (unsigned long long)c->far_limit,
            (unsigned long long)c->placed, (unsigned long long)c->told);
  }
}

/* Its process has ended: nothing of it stays. */
static void end_hostile(void) {
  tell_one(VMMC_CONTROL_DETACH, HOSTILE, shared->serial, 0, -1);
  raise(SIGIO);
  for (int i = 0; nic.endpoint[HOSTILE]; i++) {
    if (i == 50) {
      say_open(nic.endpoint[HOSTILE]);
      fail("the hostile program's endpoint does not end");
    }
    rest();
    send_away();
  }
  rest();
  munmap(hostile, VMMC_APP_BYTES);
  munmap((void *)hostile_nic, VMMC_NIC_BYTES);
  close(hostile_fd);
  remove_segment(part(shared->serial, "app"));
  remove_segment(part(shared->serial, "nic"));
  remove_segment(part(shared->serial, "own"));
}

#ifdef FETCHES
/* Before each load of the firmware's from the hostile segment (fetches.c). */
static uint64_t fetch_state;
void before_fetch(void *address, size_t size);
void before_fetch(void *address, size_t size) {
  if (!stepping || truncated || size > 8 || size < 4) return;
  struct endpoint *e = nic.endpoint[HOSTILE]; /* the NIC's own mapping of it */
  if (!e || (char *)address < e->app || (char *)address >= e->app + VMMC_APP_HEAP) return;
  fetch_state = fetch_state * 6364136223846793005u + 1442695040888963407u;
  if (fetch_state >> 58) return; /* one in 64 */
  uint8_t bytes[16];
  for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)(fetch_state >> (i % 8 * 7));
  struct input in = { bytes, bytes + sizeof bytes };
  uint64_t offset = (uint64_t)((char *)address - e->app);
  put(offset, value(&in, look(hostile, offset), look(hostile_nic, offset)), size == 8 ? 8 : 4);
}
#endif

static void start(void) {
  signal(SIGALRM, say_where);
  signal(SIGABRT, say_where);
  int log = memfd_create("log", MFD_CLOEXEC);
#ifdef LIBFUZZER
  said = 1; /* -close_fd_mask=2: libFuzzer has a descriptor of its own for what it says */
#else
  said = dup(2);
#endif
  CHECK(said >= 0 && log >= 0 && dup2(log, 2) == 2 && fcntl(2, F_SETFL, O_APPEND) == 0);
  close(log);
  if (__sanitizer_set_report_fd) __sanitizer_set_report_fd((void *)(uintptr_t)said);
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(died);
  close(segment("pub", sizeof(struct vmmc_pub)));
  close(segment("door", sizeof(struct vmmc_door)));
  close(segment("state", STATE_BYTES));
  CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, control) == 0 && pipe2(waker_pipe, O_NONBLOCK) == 0);
  char descriptor[12];
  snprintf(descriptor, sizeof descriptor, "%d", control[1]);
  char *argument[] = { "vmmc-nic", "--cluster", prefix, "--uid", "0", "--node", "0", "--nodes", "1", "--control", descriptor, NULL };
  nic_start(11, argument);
  start_honest();
}

static void begin_case(void) {
  static bool started;
  if (!started) start();
  started = true;
  if (ftruncate(2, 0)) fail("the log");
  hostile = attach(HOSTILE, &hostile_fd, &hostile_nic);
  truncated = false;
  rest();
}

static void end_case(void) {
  rest();
  check_honest();
  end_hostile();
  check_honest();
}

static void run(const uint8_t *data, size_t size) {
  struct input in = { data, data + size };
  begin_case();
  begin(&in);
  stepping = true;
  while (in.at < in.end) step(&in);
  stepping = false;
  end_case();
}

/* ---- what was found, by name ---- */

/* Nothing is held any more to see whether it is idle. */
static void rest_until_swept(void) {
  for (uint64_t due_ns; (due_ns = give_back_due_ns()) != 0; rest()) {
    struct timespec due = { (time_t)(due_ns / 1000000000u), (long)(due_ns % 1000000000u) };
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
  }
}

static void listen_and_connect(void) {
  take(hostile, 0, 1);
  take(hostile, 1, 1);
  request(hostile, 0, VMMC_REQUEST_LISTEN, 7000, 0, 4);
  rest();
  request(hostile, 1, VMMC_REQUEST_CONNECT, 7000, 0, 0);
  rest();
}

/* Closed with a position inside an entry of its accept queue: bytes of two entries were taken for a slot. */
static void accept_inside_an_entry(void) {
  listen_and_connect();
  app(hostile, 0)->consumed = 1;
  app(hostile, 0)->shut = VMMC_CLOSED;
  ring(hostile, 0);
}

/* The same, the position having been taken over when the listener was found idle. */
static void idle_inside_an_entry(void) {
  listen_and_connect();
  app(hostile, 0)->consumed = 1;
  rest_until_swept();
  app(hostile, 0)->shut = VMMC_CLOSED;
  ring(hostile, 0);
}

/* Closed sockets that share a port and each still ask to listen on it: one look led to the other for ever. */
static void closed_and_asking(void) {
  for (uint32_t slot = 0; slot < 3; slot++) {
    take(hostile, slot, 1);
    request(hostile, slot, VMMC_REQUEST_BIND, 7001, VMMC_BIND_REUSEADDR, 0);
  }
  rest();
  for (uint32_t slot = 0; slot < 3; slot++) {
    request(hostile, slot, VMMC_REQUEST_LISTEN, 7001, VMMC_BIND_REUSEADDR, 1);
    app(hostile, slot)->shut = VMMC_CLOSED;
  }
}

static void must_be_expelled(void) {
  rest();
  if (nic.endpoint[HOSTILE]) fail("it was not detached");
}

/* More than its peer has room for: it stays until the peer ends the connection, and no longer. */
static void written_where_nobody_reads(void) {
  for (uint32_t slot = 0; slot < 3; slot++) {
    take(hostile, slot, 1);
    request(hostile, slot, VMMC_REQUEST_CONNECT, slot ? STREAM_PORT : PORT, 0, 0);
    rest();
    app(hostile, slot)->written = VMMC_RING;
    ring(hostile, slot);
  }
}

/* The number of commands goes back: two sends waited for each other. */
static void commands_go_back(void) {
  post(hostile, &(struct vmmc_command){ .op = VMMC_OP_NOP });
  rest();
  ((struct vmmc_app_header *)hostile)->command_tail = 0;
  must_be_expelled();
}

static void too_many_commands(void) {
  ((struct vmmc_app_header *)hostile)->command_tail = UINT64_MAX / 2;
  must_be_expelled();
}

/* A segment that is cut short: the NIC died of it, and so did its successor. */
static void cut_short(void) {
  accept_inside_an_entry();
  app(hostile, 0)->consumed = 0;
  CHECK(ftruncate(hostile_fd, 0) == 0);
  must_be_expelled();
}

/* The same when it is to be detached already, for something else. */
static void cut_short_as_well(void) {
  nic.endpoint[HOSTILE]->wrong = "a test";
  cut_short();
}

static void watch_with(int fd) {
  tell_one(VMMC_CONTROL_WAKER, HOSTILE, shared->serial, 0, fd);
  raise(SIGIO);
  turns(1); /* it is written to once */
}

/* An event descriptor whose count is full, and that blocks: the NIC waited for the program to read it. */
static void blocking_waker(void) {
  int fd = eventfd(0, EFD_NONBLOCK);
  watch_with(fd);
  CHECK(nic.endpoint[HOSTILE]->waker[0] >= 0);
  uint64_t rest_of_it = UINT64_MAX - 1, count;
  CHECK(read(fd, &count, sizeof count) == sizeof count && write(fd, &rest_of_it, sizeof rest_of_it) == sizeof rest_of_it);
  CHECK(fcntl(fd, F_SETFL, 0) == 0);
  ((struct vmmc_app_header *)hostile)->group[0].wakers = 1;
  take(hostile, 0, 1);
  app(hostile, 0)->watch = 1;
  request(hostile, 0, VMMC_REQUEST_BIND, 0, 0, 0);
  rest();
  if (nic.endpoint[HOSTILE]->complained) fail("the NIC was held up by a full descriptor, which is readable as it is");
  close(fd);
}

/* Any other file as a waker was written to. */
static void waker_that_is_a_pipe(void) {
  watch_with(waker_pipe[1]);
  char byte;
  if (nic.endpoint[HOSTILE]->waker[0] >= 0 || read(waker_pipe[0], &byte, 1) == 1) fail("a pipe is taken for an event descriptor");
}

/* An export of all its memory with each command: looking at 2^18 pages took milliseconds a time.  Counted in
 * turns, others had none of them meanwhile. */
static void a_share_of_commands(void) {
  memset(hostile + VMMC_APP_UTLB, VMMC_UTLB_VALID, VMMC_HEAP_PAGES);
  for (uint32_t i = 0; i < VMMC_COMMANDS; i++)
    post(hostile, &(struct vmmc_command){ .op = i % 2 ? VMMC_OP_UNEXPORT : VMMC_OP_EXPORT, .length = VMMC_HEAP_BYTES,
                                          .permissions = VMMC_PERMIT_READ, .node = VMMC_ANY_NODE });
  const struct vmmc_nic_header *n = (const void *)hostile_nic;
  turns(1);
  if (n->commands_taken >= VMMC_COMMANDS / 4) fail("all in one turn");
  rest();
  CHECK(n->commands_taken == VMMC_COMMANDS);
}

/* A program that rings for all of its slots: others have their turn after a share of them. */
static void a_share_of_doorbells(void) {
  enum { MANY = 2000, TURN = 256 + 64 };
  for (uint32_t slot = 0; slot < MANY; slot++) take(hostile, slot, 1);
  uint32_t before = 0;
  for (int turn = 0; before < MANY; turn++) {
    uint32_t seen = 0;
    turns(1);
    for (uint32_t slot = 0; slot < MANY; slot++) seen += nic_of(hostile_nic, slot)->generation == 1;
    if (seen - before > TURN) fail("more than its share in one turn");
    if (turn > MANY) fail("a slot that is never looked at");
    before = seen;
    ring(hostile, 0); /* again and again: those behind it have their turn all the same */
  }
}

/* Hundreds of connections with something to send: another program's one waited for all of them. */
static void a_share_of_the_link(void) {
  enum { MANY = 200 };
  take(hostile, 0, 1);
  request(hostile, 0, VMMC_REQUEST_LISTEN, 7000, 0, MANY);
  rest();
  for (uint32_t slot = 1; slot <= MANY; slot++) {
    take(hostile, slot, 1);
    request(hostile, slot, VMMC_REQUEST_CONNECT, 7000, 0, 0);
  }
  rest();
  for (uint32_t slot = 1; slot <= MANY; slot++) {
    CHECK(nic_of(hostile_nic, slot)->state == VMMC_ESTABLISHED);
    app(hostile, slot)->written = 1000;
    ring(hostile, slot);
  }
  turns(1);
  honest_writes(1000);
  turns(1);
  CHECK(nic_of(hostile_nic, MANY)->transmitted == 0);
  if (nic_of(honest_nic, CLIENT)->transmitted != honest_sent) fail("it waits until all others have sent");
}

static const struct {
  const char *name;
  void (*scenario)(void);
} found[] = {
  { "accept-inside-an-entry", accept_inside_an_entry }, { "idle-inside-an-entry", idle_inside_an_entry },
  { "closed-and-asking", closed_and_asking },
  { "commands-go-back", commands_go_back }, { "too-many-commands", too_many_commands },
  { "cut-short", cut_short }, { "cut-short-as-well", cut_short_as_well }, { "blocking-waker", blocking_waker }, { "waker-that-is-a-pipe", waker_that_is_a_pipe },
  { "a-share-of-commands", a_share_of_commands }, { "a-share-of-doorbells", a_share_of_doorbells },
  { "a-share-of-the-link", a_share_of_the_link }, { "written-where-nobody-reads", written_where_nobody_reads },
};

static int again(const char *name) {
  int runs = 0;
  for (size_t i = 0; i < sizeof found / sizeof *found; i++) {
    if (strcmp(name, "all") && strcmp(name, found[i].name)) continue;
    runs++;
    dprintf(said, "%s\n", found[i].name);
    begin_case();
    found[i].scenario();
    end_case();
  }
  return runs ? 0 : 2;
}

static void clean(void) {
  static const char *whats[] = { "pub", "door", "state", "link.node0" };
  for (int i = 0; i < 4; i++) remove_segment(whats[i]);
  for (uint32_t s = 1; s <= shared->serial; s = s < shared->serial ? shared->serial : s + 1) { /* the honest one, and the last */
    remove_segment(part(s, "app"));
    remove_segment(part(s, "nic"));
    remove_segment(part(s, "own"));
  }
}

#ifdef LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static bool once;
  static __typeof__(*shared) here;
  if (!once) atexit(clean);
  once = true;
  shared = &here;
  snprintf(prefix, sizeof prefix, "fuzz-%d", getpid());
  newest.data = data;
  newest.size = size;
  run(data, size < INPUT_MAX ? size : INPUT_MAX);
  return 0;
}
#else
static uint64_t mix(uint64_t x) { /* splitmix64 */
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

static void run_case(uint64_t number) {
  uint8_t data[INPUT_MAX];
  shared->current = number;
  uint64_t state = mix(seed * 1000003 + number);
  size_t size = 30 + state % (INPUT_MAX - 30);
#ifdef FETCHES
  fetch_state = state;
#endif
  for (size_t i = 0; i < size; i++) data[i] = (uint8_t)(mix(state + i + 1) >> 24);
  run(data, size);
}

static int run_all(int count, char **argument) {
  if (count == 2) return again(argument[1]);
  time_t end = time(NULL) + atoi(argument[2]);
  uint64_t cases = 0;
  if (count == 4)
    run_case(strtoull(argument[3], NULL, 10)), cases = 1;
  else
    while (time(NULL) < end) run_case(cases++);
  printf("%llu cases of seed %llu: nothing found\n", (unsigned long long)cases, (unsigned long long)seed);
  return 0;
}

int main(int count, char **argument) {
  if (count < 2 || count > 4) return 2;
  seed = strtoull(argument[1], NULL, 10);
  snprintf(prefix, sizeof prefix, "fuzz-%d", getpid());
  shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(shared != MAP_FAILED);
  pid_t child = fork(); /* whatever becomes of it, somebody says where it was, and cleans up */
  CHECK(child >= 0);
  if (!child) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    exit(run_all(count, argument));
  }
  int status;
  while (waitpid(child, &status, 0) < 0) CHECK(errno == EINTR);
  clean();
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
  fprintf(stderr, "fuzz: ended with status %#x in case %llu of seed %llu\n", (unsigned)status,
          (unsigned long long)shared->current, (unsigned long long)seed);
  return 1;
}
#endif
