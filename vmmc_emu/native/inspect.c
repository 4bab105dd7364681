/*
 * inspect.c: observers.  Everything is read with pread, never through a mapping: reading a hole of a
 * mapped segment would commit a page of it, and a segment cut short would be a SIGBUS.
 */
#include "vmmc_inspect.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vmmc_idle.h"
#include "vmmc_layout.h"

uint64_t vmmc_layout_size(const char *what) {
  const struct {
    const char *what;
    uint64_t size;
  } sizes[] = {
      {"app", VMMC_APP_BYTES},
      {"nic", VMMC_NIC_BYTES},
      {"own", 64ull << 20},
      {"state", 64ull << 20},
      {"pub", (sizeof(struct vmmc_pub) + VMMC_PAGE - 1) / VMMC_PAGE * VMMC_PAGE},
      {"served", offsetof(struct vmmc_pub, endpoint)},
      {"door", (sizeof(struct vmmc_door) + VMMC_PAGE - 1) / VMMC_PAGE * VMMC_PAGE},
      {"magic", VMMC_MAGIC},
      {"version", VMMC_LAYOUT_VERSION},
      {"nodes", VMMC_NODES_MAX},
      {"endpoints", VMMC_ENDPOINTS_MAX},
      {"ring", VMMC_RING},
      {"heap", VMMC_HEAP_BYTES},
  };
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    if (strcmp(sizes[i].what, what) == 0) return sizes[i].size;
  return 0;
}

/* ---- the end of a node ---- */

/* Without a mapping to store in: whoever cut the segment short would end us by it. */
static bool change_and_wake(int fd, char *base, size_t offset) {
  uint32_t value;
  if (pread(fd, &value, sizeof value, (off_t)offset) != sizeof value) return false;
  value++;
  if (pwrite(fd, &value, sizeof value, (off_t)offset) != sizeof value) return false;
  vmmc_futex_wake((_Atomic uint32_t *)(base + offset));
  return true;
}

int vmmc_tell_gone(const char *path, const char *why) {
  enum { HEADER = sizeof(struct vmmc_nic_header) };
  char text[sizeof((struct vmmc_nic_header *)NULL)->why] = "";
  const uint32_t gone = 2;
  int fd = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return -1;
  char *base = mmap(NULL, HEADER, PROT_READ, MAP_SHARED, fd, 0);
  snprintf(text, sizeof text, "%s", why);
  /* In the order in which a NIC does it: what is found changed, or was woken, looks at `detached`, which has a reason. */
  bool told = base != MAP_FAILED &&
              pwrite(fd, text, sizeof text, offsetof(struct vmmc_nic_header, why)) == sizeof text &&
              pwrite(fd, &gone, sizeof gone, offsetof(struct vmmc_nic_header, detached)) == sizeof gone &&
              change_and_wake(fd, base, offsetof(struct vmmc_nic_header, wake_completion)) &&
              change_and_wake(fd, base, offsetof(struct vmmc_nic_header, wake_notification));
  int error = errno;
  if (base != MAP_FAILED) munmap(base, HEADER);
  close(fd);
  errno = error;
  return told ? 0 : -1;
}

int vmmc_tell_off(const char *path) {
  const int32_t none = 0;
  int fd = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return -1;
  bool told = pwrite(fd, &none, sizeof none, offsetof(struct vmmc_pub, nic_pid)) == sizeof none;
  int error = errno;
  close(fd);
  errno = error;
  return told ? 0 : -1;
}

/* ---- segments by name ---- */

static bool name_is_good(const char *cluster) {
  size_t length = cluster ? strlen(cluster) : 0;
  return length >= 1 && length <= VMMC_NAME_MAX &&
         strspn(cluster, "abcdefghijklmnopqrstuvwxyz0123456789-") == length;
}

/* Opens a segment of a node; -1 with errno set. */
static int segment_open(const char *cluster, uint32_t node, const char *what) {
  if (!name_is_good(cluster) || node >= VMMC_NODES_MAX) {
    errno = EINVAL;
    return -1;
  }
  char name[128];
  snprintf(name, sizeof name, "/vmmc.%u.%s.node%u.%s", (unsigned)getuid(), cluster, node, what);
  return shm_open(name, O_RDONLY | O_CLOEXEC, 0);
}

/* An endpoint's segment: what is "app" or "nic". */
static int endpoint_open(const char *cluster, uint32_t node, uint32_t serial, const char *what) {
  char part[32];
  snprintf(part, sizeof part, "ep%u.%s", serial, what);
  return segment_open(cluster, node, part);
}

/* Reads exactly that much, or says false: the segment is shorter than it should be. */
static bool segment_read(int fd, uint64_t offset, void *to, size_t length) {
  for (size_t done = 0; done < length;) {
    ssize_t n = pread(fd, (char *)to + done, length - done, (off_t)(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += (size_t)n;
  }
  return true;
}

/* The node's public page; false with errno set. */
static bool pub_read(const char *cluster, uint32_t node, struct vmmc_pub *pub) {
  int fd = segment_open(cluster, node, "pub");
  if (fd < 0) return false;
  bool whole = segment_read(fd, 0, pub, sizeof *pub);
  close(fd);
  if (whole && pub->magic == VMMC_MAGIC && pub->version == VMMC_LAYOUT_VERSION) return true;
  errno = ENOENT; /* made by the daemon, but no NIC has served it yet; or of another version */
  return false;
}

/* A name that a program gave: printable ASCII only, so that it cannot steer a terminal. */
static void copy_command(char *to, size_t size, const char *from, size_t from_size) {
  size_t length = 0;
  for (; length + 1 < size && length < from_size && from[length]; length++)
    to[length] = from[length] > ' ' && from[length] < 0x7f ? from[length] : '?';
  to[length] = 0;
}

static bool app_header_read(const char *cluster, uint32_t node, uint32_t serial,
                            struct vmmc_app_header *header) {
  int fd = endpoint_open(cluster, node, serial, "app");
  if (fd < 0) return false;
  bool whole = segment_read(fd, 0, header, sizeof *header);
  close(fd);
  return whole;
}

/* ---- counters ---- */

enum {
#define ONE(name, meaning) +1
  NIC_COUNTERS = 0 VMMC_NIC_COUNTERS(ONE),
  APP_COUNTERS = 0 VMMC_APP_COUNTERS(ONE),
  COUNTERS = NIC_COUNTERS + APP_COUNTERS,
#undef ONE
};
_Static_assert(sizeof(struct vmmc_nic_counters) == NIC_COUNTERS * sizeof(uint64_t), "counters are an array");
_Static_assert(sizeof(struct vmmc_app_counters) == APP_COUNTERS * sizeof(uint64_t), "counters are an array");

static int counters_fill(const uint64_t *values, struct vmmc_counter *counters, int most) {
  static const struct {
    const char *name, *meaning;
  } text[COUNTERS] = {
#define TEXT(name, meaning) {#name, meaning},
      VMMC_NIC_COUNTERS(TEXT) VMMC_APP_COUNTERS(TEXT)
#undef TEXT
  };
  for (int i = 0; i < COUNTERS && i < most; i++)
    counters[i] = (struct vmmc_counter){text[i].name, text[i].meaning, values[i]};
  return COUNTERS;
}

/* One look: false when an endpoint came or went meanwhile, for then it may be counted twice, or not at all. */
static bool counters_look(const char *cluster, uint32_t node, const struct vmmc_pub *pub, uint64_t *values) {
  memcpy(values, &pub->counters, sizeof pub->counters);
  memcpy(values + NIC_COUNTERS, &pub->retired, sizeof pub->retired);
  for (int i = 0; i < VMMC_ENDPOINTS_MAX; i++) {
    uint32_t serial = atomic_load_explicit(&pub->endpoint[i], memory_order_relaxed);
    struct vmmc_app_header header;
    if (!serial || !app_header_read(cluster, node, serial, &header)) continue;
    uint64_t of_app[APP_COUNTERS];
    memcpy(of_app, &header.counters, sizeof of_app);
    for (int c = 0; c < APP_COUNTERS; c++) values[NIC_COUNTERS + c] += of_app[c];
  }
  struct vmmc_pub after;
  return pub_read(cluster, node, &after) && !pub->retiring && !after.retiring &&
         !memcmp(&pub->retired, &after.retired, sizeof after.retired) &&
         !memcmp(&pub->endpoint, &after.endpoint, sizeof after.endpoint);
}

int vmmc_node_counters(const char *cluster, uint32_t node, struct vmmc_counter *counters, int most) {
  enum { LOOKS = 100 }; /* where endpoints come and go all the time, the last one has to do */
  struct vmmc_pub pub;
  uint64_t values[COUNTERS];
  for (int look = 0; look < LOOKS; look++) {
    if (!pub_read(cluster, node, &pub)) return -1;
    if (counters_look(cluster, node, &pub, values)) break;
    sched_yield(); /* the NIC may be waiting for this core */
  }
  return counters_fill(values, counters, most);
}

int vmmc_endpoint_counters(const char *cluster, uint32_t node, uint32_t serial, struct vmmc_counter *counters,
                           int most) {
  int fd = endpoint_open(cluster, node, serial, "nic");
  if (fd < 0) return -1;
  struct vmmc_nic_header nic;
  bool whole = segment_read(fd, 0, &nic, sizeof nic);
  close(fd);
  struct vmmc_app_header app;
  if (!whole || !app_header_read(cluster, node, serial, &app)) {
    errno = ENOENT;
    return -1;
  }
  uint64_t values[COUNTERS];
  memcpy(values, &nic.counters, sizeof nic.counters);
  memcpy(values + NIC_COUNTERS, &app.counters, sizeof app.counters);
  return counters_fill(values, counters, most);
}

/* What one NIC counts of its link with a peer; false: there is no such link (yet). */
static bool link_counters_read(const char *cluster, uint32_t node, uint32_t peer, struct vmmc_link_counters *found) {
  char what[32];
  snprintf(what, sizeof what, "link.node%u", peer);
  int fd = segment_open(cluster, node, what);
  if (fd < 0) return false;
  struct vmmc_link_header header;
  bool whole = segment_read(fd, 0, &header, sizeof header) && header.magic == VMMC_MAGIC;
  close(fd);
  if (whole) *found = header.counters;
  return whole;
}

int vmmc_link_counters(const char *cluster, uint32_t from, uint32_t to, struct vmmc_counter *counters, int most) {
  struct vmmc_pub pub;
  if (!pub_read(cluster, from, &pub) || !pub_read(cluster, to, &pub)) return -1;
  struct vmmc_link_counters sender = {0}, receiver = {0};
  link_counters_read(cluster, from, to, &sender);
  link_counters_read(cluster, to, from, &receiver);
  const struct {
    const char *name, *meaning;
    uint64_t sender, receiver;
  } each[] = {
#define BOTH(name, meaning) {#name, meaning, sender.name, receiver.name},
      VMMC_LINK_COUNTERS(BOTH)
#undef BOTH
  };
  const int count = (int)(sizeof each / sizeof *each);
  const size_t link = offsetof(struct vmmc_link_counters, packets_resent) / sizeof(uint64_t);
  for (int i = 0; i < count && i < most; i++)
    counters[i] = (struct vmmc_counter){each[i].name, each[i].meaning, (size_t)i < link ? each[i].receiver : each[i].sender};
  return count;
}

/* ---- nodes and endpoints ---- */

int vmmc_node_info(const char *cluster, uint32_t node, struct vmmc_node_info *info) {
  struct vmmc_pub pub;
  if (!pub_read(cluster, node, &pub)) return -1;
  *info = (struct vmmc_node_info){
      .node = pub.node,
      .nodes = pub.nodes,
      .incarnation = atomic_load_explicit(&pub.incarnation, memory_order_relaxed),
      .nic_pid = atomic_load_explicit(&pub.nic_pid, memory_order_relaxed),
      .asleep = atomic_load_explicit(&pub.asleep, memory_order_relaxed),
  };
  for (int i = 0; i < VMMC_ENDPOINTS_MAX; i++)
    info->endpoints += atomic_load_explicit(&pub.endpoint[i], memory_order_relaxed) != 0;
  return 0;
}

int vmmc_endpoints(const char *cluster, uint32_t node, struct vmmc_endpoint_info *endpoints, int most) {
  struct vmmc_pub pub;
  if (!pub_read(cluster, node, &pub)) return -1;
  int count = 0;
  for (int i = 0; i < VMMC_ENDPOINTS_MAX; i++) {
    uint32_t serial = atomic_load_explicit(&pub.endpoint[i], memory_order_relaxed);
    struct vmmc_app_header header;
    if (!serial || !app_header_read(cluster, node, serial, &header)) continue;
    if (count < most) {
      struct vmmc_endpoint_info *e = &endpoints[count];
      *e = (struct vmmc_endpoint_info){.endpoint = (uint32_t)i, .serial = serial, .pid = header.pid};
      copy_command(e->command, sizeof e->command, header.command, sizeof header.command);
    }
    count++;
  }
  return count;
}

/* ---- sockets ---- */

static void address_text(const struct vmmc_address *address, char *text, size_t size) {
  char ip[INET6_ADDRSTRLEN] = "*", port[8] = "*";
  bool v6 = address->family == AF_INET6;
  if (address->family == AF_INET) inet_ntop(AF_INET, address->ip + 12, ip, sizeof ip);
  if (v6) inet_ntop(AF_INET6, address->ip, ip, sizeof ip);
  if (address->port) snprintf(port, sizeof port, "%u", address->port);
  snprintf(text, size, v6 ? "[%s]:%s" : "%s:%s", ip, port);
}

/* What both sides have shut decides the name of an established connection's state. */
static const char *state_name(uint32_t state, uint32_t status, uint32_t shut) {
  bool ended = status & VMMC_END_OF_FILE, shut_write = shut & (VMMC_SHUT_WRITE | VMMC_CLOSED);
  switch (state) {
  case VMMC_IDLE: return "UNCONN";
  case VMMC_LISTENING: return "LISTEN";
  case VMMC_CONNECTING: return "SYN-SENT";
  case VMMC_ESTABLISHED:
    return ended ? (shut_write ? "LAST-ACK" : "CLOSE-WAIT") : (shut_write ? "FIN-WAIT" : "ESTAB");
  case VMMC_DEAD: return "CLOSED";
  default: return "UNKNOWN";
  }
}

/* Bytes between two positions, where garbage must not look like exabytes. */
static uint64_t queued(uint64_t upto, uint64_t from) {
  uint64_t bytes = upto - from;
  return upto < from ? 0 : bytes > VMMC_RING ? VMMC_RING : bytes;
}

static void socket_fill(const struct vmmc_app_slot *app, const struct vmmc_nic_slot *nic,
                        struct vmmc_socket_info *s) {
  uint32_t state = atomic_load_explicit(&nic->state, memory_order_relaxed);
  uint32_t status = atomic_load_explicit(&nic->status, memory_order_relaxed);
  uint32_t generation = atomic_load_explicit(&nic->generation, memory_order_relaxed);
  /* The app's half speaks of this socket only when it carries the same generation: one that waits to be
   * accepted has no half of the app's yet. */
  static const struct vmmc_app_slot nobody;
  if (atomic_load_explicit(&app->generation, memory_order_relaxed) != generation) app = &nobody;
  uint64_t written = atomic_load_explicit(&app->written, memory_order_relaxed);
  uint64_t consumed = atomic_load_explicit(&app->consumed, memory_order_relaxed);
  uint64_t placed = atomic_load_explicit(&nic->placed, memory_order_relaxed);
  uint64_t transmitted = atomic_load_explicit(&nic->transmitted, memory_order_relaxed);
  uint32_t shut = atomic_load_explicit(&app->shut, memory_order_relaxed);
  snprintf(s->state, sizeof s->state, "%s", state_name(state, status, shut));
  address_text(&nic->local, s->local, sizeof s->local);
  address_text(&nic->peer, s->peer, sizeof s->peer);
  s->error = (int32_t)(status & VMMC_ERRNO_MASK);
  s->receive_queue = queued(placed, consumed);
  if (state == VMMC_LISTENING) {
    s->receive_queue /= sizeof(struct vmmc_accept_entry);
    s->send_queue = app->backlog;
  } else {
    s->send_queue = queued(written, transmitted);
    s->received = placed;
    s->sent = transmitted;
  }
}

enum { SLOTS_AT_ONCE = 64 };

/* The next range of a segment at or after *from and before `end` that is committed; false: none. */
static bool next_committed(int fd, uint64_t *from, uint64_t end, uint64_t *upto) {
  off_t data = lseek(fd, (off_t)*from, SEEK_DATA);
  if (data < 0 || (uint64_t)data >= end) return false;
  off_t hole = lseek(fd, data, SEEK_HOLE);
  if ((uint64_t)data > *from) *from = (uint64_t)data;
  *upto = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;
  return *upto > *from;
}

/* Goes through the slots of one endpoint that lie in committed pages of the NIC's half: no slot is in use
 * that the NIC has not written.  Returns the count so far. */
static int sockets_of_endpoint(int app_fd, int nic_fd, const struct vmmc_socket_info *pattern,
                               struct vmmc_socket_info *sockets, int most, int count) {
  const uint64_t size = sizeof(struct vmmc_nic_slot), end = VMMC_NIC_SLOTS + VMMC_SLOTS * size;
  static const struct vmmc_app_slot nobody;
  uint64_t upto;
  for (uint64_t at = VMMC_NIC_SLOTS; next_committed(nic_fd, &at, end, &upto); at = upto) {
    /* Page borders are slot borders: a slot's size divides a page's. */
    for (uint64_t offset = at; offset < upto;) {
      struct vmmc_nic_slot nic[SLOTS_AT_ONCE];
      uint64_t slots = (upto - offset) / size;
      if (slots > SLOTS_AT_ONCE) slots = SLOTS_AT_ONCE;
      if (slots == 0 || !segment_read(nic_fd, offset, nic, slots * size)) return count;
      for (uint64_t i = 0; i < slots; i++) {
        if (atomic_load_explicit(&nic[i].state, memory_order_relaxed) == VMMC_FREE) continue;
        if (count < most) {
          uint32_t slot = (uint32_t)((offset - VMMC_NIC_SLOTS) / size + i);
          struct vmmc_app_slot app;
          uint64_t of_app = VMMC_APP_SLOTS + slot * sizeof app;
          if (!segment_read(app_fd, of_app, &app, sizeof app)) app = nobody;
          sockets[count] = *pattern;
          sockets[count].slot = slot;
          socket_fill(&app, &nic[i], &sockets[count]);
        }
        count++;
      }
      offset += slots * size;
    }
  }
  return count;
}
_Static_assert(VMMC_PAGE % sizeof(struct vmmc_nic_slot) == 0 && VMMC_NIC_SLOTS % VMMC_PAGE == 0,
               "no slot spans pages");

int vmmc_sockets(const char *cluster, uint32_t node, struct vmmc_socket_info *sockets, int most) {
  struct vmmc_pub pub;
  if (!pub_read(cluster, node, &pub)) return -1;
  int count = 0;
  for (int i = 0; i < VMMC_ENDPOINTS_MAX; i++) {
    uint32_t serial = atomic_load_explicit(&pub.endpoint[i], memory_order_relaxed);
    struct vmmc_app_header header;
    if (!serial || !app_header_read(cluster, node, serial, &header)) continue;
    int app_fd = endpoint_open(cluster, node, serial, "app"),
        nic_fd = endpoint_open(cluster, node, serial, "nic");
    if (app_fd >= 0 && nic_fd >= 0) {
      struct vmmc_socket_info pattern = {.pid = header.pid, .serial = serial};
      copy_command(pattern.command, sizeof pattern.command, header.command, sizeof header.command);
      count = sockets_of_endpoint(app_fd, nic_fd, &pattern, sockets, most, count);
    }
    if (app_fd >= 0) close(app_fd);
    if (nic_fd >= 0) close(nic_fd);
  }
  return count;
}
