/* endpoint.c: programs attached to this node: their segments, their doorbells, and their end. */
#include <fcntl.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "nic.h"

static void *map_part(uint32_t node, uint32_t serial, const char *part, uint64_t bytes, bool writable, int *fd) {
  char what[48];
  snprintf(what, sizeof what, "ep%u.%s", serial, part);
  return segment_map(node, what, bytes, writable, fd);
}

static void unmap(struct endpoint *e) {
  if (e->app) munmap(e->app, VMMC_APP_BYTES);
  if (e->nic) munmap(e->nic, VMMC_NIC_BYTES);
  if (e->own) munmap(e->own, OWN_BYTES);
  if (e->work) munmap(e->work, VMMC_SLOTS * sizeof *e->work);
  if (e->app_fd >= 0) close(e->app_fd);
  if (e->nic_fd >= 0) close(e->nic_fd);
  if (e->own_fd >= 0) close(e->own_fd);
  for (int i = 0; i < VMMC_WAKERS; i++)
    if (e->waker[i] >= 0) close(e->waker[i]);
  if (e->memory >= 0) close(e->memory);
  free(e);
}

struct endpoint *endpoint_find(uint32_t index, uint32_t serial) {
  struct endpoint *e = index < VMMC_ENDPOINTS_MAX ? nic.endpoint[index] : NULL;
  return e && e->serial == serial ? e : NULL;
}

static bool map_all(struct endpoint *e) {
  /* First what the program is told in, should the rest fail. */
  e->nic = map_part(nic.node, e->serial, "nic", VMMC_NIC_BYTES, true, &e->nic_fd);
  if (e->nic && !segment_commit(e->nic_fd, 0, sizeof(struct vmmc_nic_header))) {
    munmap(e->nic, VMMC_NIC_BYTES);
    e->nic = NULL;
  }
  if (!e->nic) return false;
  e->app = map_part(nic.node, e->serial, "app", VMMC_APP_BYTES, true, &e->app_fd);
  if (!e->app) return false;
  e->own = map_part(nic.node, e->serial, "own", OWN_BYTES, true, &e->own_fd);
  if (!e->own || !segment_commit(e->own_fd, 0, VMMC_PAGE)) return false;
  void *work = mmap(NULL, VMMC_SLOTS * sizeof *e->work, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  e->work = work == MAP_FAILED ? NULL : work;
  return e->work;
}

/* One that the program may use: nothing is under way in it any more. */
static void end_slot(struct vmmc_nic_slot *n) {
  if (!atomic_load_explicit(&n->generation, memory_order_relaxed)) return;
  uint32_t status = atomic_load_explicit(&n->status, memory_order_relaxed);
  if (!(status & VMMC_ERRNO_MASK)) atomic_store_explicit(&n->status, status | ECONNRESET, memory_order_release);
  uint32_t taken = atomic_load_explicit(&n->ring_taken, memory_order_relaxed);
  if (taken % 2) atomic_store_explicit(&n->ring_taken, taken + 1, memory_order_release);
  atomic_store_explicit(&n->claim, 0, memory_order_release);
}

/*
 * Tells a program that lives that it is served no more, as far as that can be said in `nic` alone: its library
 * refuses new calls, finds its connections reset, and whoever sleeps in it, even in a slot that was never looked
 * at, is woken.
 */
static void tell_detached(struct endpoint *e, const char *why) {
  struct vmmc_nic_header *header = nic_header(e);
  snprintf(header->why, sizeof header->why, "%s", why);
  /* seq_cst: before the words change, so that who goes to sleep sees this or the change */
  atomic_store(&header->detached, 1);
  enum { SLOTS_PER_PAGE = VMMC_PAGE / sizeof(struct vmmc_nic_slot) };
  const off_t end = VMMC_NIC_SLOTS + VMMC_SLOTS * sizeof(struct vmmc_nic_slot);
  /* Pages that were never touched have no sleepers, and stay away. */
  for (off_t at = VMMC_NIC_SLOTS; (at = lseek(e->nic_fd, at, SEEK_DATA)) >= 0 && at < end; at += VMMC_PAGE) {
    struct vmmc_nic_slot *slot = (struct vmmc_nic_slot *)(e->nic + at);
    for (int i = 0; i < SLOTS_PER_PAGE; i++) {
      end_slot(&slot[i]);
      wake_words(&slot[i]);
    }
  }
  wake_all(e);
}

/* A predecessor served this endpoint: everything that it knew is in `own`. */
static void recover(struct endpoint *e) {
  struct own *own = e->own;
  struct vmmc_nic_header *header = nic_header(e);
  uint64_t events = atomic_load_explicit(&header->events, memory_order_relaxed);
  e->events_committed = (events * sizeof(uint32_t) + VMMC_PAGE - 1) / VMMC_PAGE * VMMC_PAGE;
  if (e->events_committed > VMMC_EVENTS * sizeof(uint32_t)) e->events_committed = VMMC_EVENTS * sizeof(uint32_t);
  /* Slots that stand in the event ring untaken are not entered again: there is room for one entry each. */
  const _Atomic uint32_t *ring = (const _Atomic uint32_t *)(e->nic + VMMC_NIC_EVENTS);
  for (uint64_t n = events > VMMC_EVENTS ? events - VMMC_EVENTS : 0; n < events; n++) {
    uint32_t slot = atomic_load_explicit(&ring[n % VMMC_EVENTS], memory_order_relaxed);
    if (slot < VMMC_SLOTS) e->work[slot].last_event = n + 1;
  }
  own->open = 0;
  own->free_passive = 0;
  for (uint32_t slot = VMMC_ACTIVE_SLOTS; slot < own->passive_end; slot++) connection_unmake(e, slot);
  for (uint32_t slot = own->passive_end; slot-- > VMMC_ACTIVE_SLOTS;) {
    struct connection *c = &own->connection[slot];
    if (c->state != CONNECTION_NONE) continue;
    c->next_free = own->free_passive;
    own->free_passive = slot + 1;
  }
  for (int pass = 0; pass < 2; pass++) {
    uint32_t end = pass ? own->passive_end : own->active_end;
    for (uint32_t slot = pass ? VMMC_ACTIVE_SLOTS : 0; slot < end; slot++)
      if (own->connection[slot].state != CONNECTION_NONE) own->open++;
  }
}

/* Goes on with its connections and commands. */
static void resume(struct endpoint *e) {
  struct own *own = e->own;
  for (int pass = 0; pass < 2; pass++) {
    uint32_t end = pass ? own->passive_end : own->active_end;
    for (uint32_t slot = pass ? VMMC_ACTIVE_SLOTS : 0; slot < end; slot++) connection_recover(e, slot);
  }
  /* Slots that the app took for the first time, whose doorbell the predecessor had answered and no more.
   * The app takes them in turn; threads that fill theirs at the same time leave gaps. */
  enum { GAP = 64 };
  for (uint32_t slot = own->active_end, last = slot; slot < VMMC_ACTIVE_SLOTS && slot < last + GAP; slot++) {
    off_t at = VMMC_APP_SLOTS + (off_t)slot * (off_t)sizeof(struct vmmc_app_slot);
    if (lseek(e->app_fd, at, SEEK_DATA) != at) continue;
    if (!atomic_load_explicit(&app_slot(e, slot)->generation, memory_order_relaxed)) continue;
    connection_look(e, slot);
    last = slot;
  }
  commands_recover(e);
}

void endpoint_attach(uint32_t index, uint32_t serial, int32_t pid) {
  struct endpoint *known = endpoint_find(index, serial);
  if (known) { /* found by a successor in `pub` before the daemon told it again */
    known->pid = pid;
    control_say(VMMC_CONTROL_ATTACHED, index, serial, 0);
    return;
  }
  bool taken = index >= VMMC_ENDPOINTS_MAX || nic.endpoint[index];
  struct endpoint *e = taken ? NULL : calloc(1, sizeof *e);
  if (!e) {
    log_event("error", "cannot attach pid %d: endpoint %u %s", pid, index, taken ? "is taken" : "finds no memory");
    control_say(VMMC_CONTROL_EXPELLED, index, serial, taken ? EBUSY : ENOMEM);
    control_say(VMMC_CONTROL_GONE, index, serial, 0);
    return;
  }
  *e = (struct endpoint){ .index = index, .serial = serial, .pid = pid, .app_fd = -1, .nic_fd = -1, .own_fd = -1, .memory = -1 };
  for (int i = 0; i < VMMC_WAKERS; i++) e->waker[i] = -1;
  if (!map_all(e)) {
    int error = errno;
    log_event("error", "cannot attach pid %d as endpoint %u: %s", pid, index, strerror(error));
    if (e->nic) {
      char why[sizeof nic_header(e)->why];
      snprintf(why, sizeof why, "its NIC cannot attach it: %s", strerror(error));
      tell_detached(e, why);
    }
    unmap(e);
    control_say(VMMC_CONTROL_EXPELLED, index, serial, error);
    control_say(VMMC_CONTROL_GONE, index, serial, 0);
    return;
  }
  nic.endpoint[index] = e;
  nic.live[nic.live_count++] = index;
  atomic_store_explicit(&nic.pub->endpoint[index], serial, memory_order_release);
  struct own *own = e->own;
  struct vmmc_nic_header *header = nic_header(e);
  for (uint32_t i = 0; i < VMMC_COMMANDS; i++) {
    e->command[i] = (struct command_work){ .work = { .transmit = transfer_transmit, .lane = e->index }, .endpoint = e, .place = i };
  }
  if (own->magic == VMMC_MAGIC && own->serial == serial) {
    recover(e);
  } else {
    own->version = VMMC_LAYOUT_VERSION;
    own->serial = serial;
    own->passive_end = VMMC_ACTIVE_SLOTS;
    in_order();
    own->magic = VMMC_MAGIC;
  }
  header->magic = VMMC_MAGIC;
  header->version = VMMC_LAYOUT_VERSION;
  header->node = nic.node;
  header->endpoint = index;
  header->serial = serial;
  atomic_store_explicit(&header->ready, 1, memory_order_release);
  /* A predecessor died while it told the program. */
  if (atomic_load_explicit(&header->detached, memory_order_relaxed)) e->wrong = "a predecessor detached it";
  control_say(VMMC_CONTROL_ATTACHED, index, serial, 0);
}

void endpoints_recover(void) {
  for (uint32_t index = 0; index < VMMC_ENDPOINTS_MAX; index++) {
    uint32_t serial = atomic_load(&nic.pub->endpoint[index]);
    if (serial) endpoint_attach(index, serial, 0);
  }
  /* All of them before any goes on: whose ports are taken is known then. */
  ports_recover();
  links_lost_meanwhile();
  for (uint32_t i = 0; i < nic.live_count; i++) resume(nic.endpoint[nic.live[i]]);
}

static void memory_descriptor(struct endpoint *e, int fd) {
  struct statfs s;
  char path[40], target[64] = "";
  int end = 0;
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  /* A write to another file may wait for anything, and one to another in /proc may be a setting. */
  if (fstatfs(fd, &s) < 0 || s.f_type != PROC_SUPER_MAGIC || readlink(path, target, sizeof target - 1) < 0 ||
      sscanf(target, "/proc/%*d/mem%n", &end) < 0 || !end || target[end]) {
    endpoint_nonsense(e, "its memory is said to be a file that is no process's memory");
    close(fd);
    return;
  }
  if (e->memory >= 0) close(e->memory);
  e->memory = fd;
}

void endpoint_waker(uint32_t index, uint32_t serial, uint32_t number, int fd) {
  struct endpoint *e = endpoint_find(index, serial);
  if (!e || number > VMMC_MEMORY) {
    /* Of one that could not be attached (again), whose sleeper is to see that. */
    if (!e && number < VMMC_MEMORY && fd >= 0 && wake_is_harmless(fd)) wake_descriptor(fd);
    if (fd >= 0) close(fd);
    return;
  }
  if (fd < 0) {
    /* It was lost on the way, or here, for want of descriptors.  Each number is one descriptor's for good: one that
     * is here already is meant.  Without the program's memory its bytes go through the default buffers. */
    if (number == VMMC_MEMORY || e->waker[number] >= 0) return;
    e->wrong = "no descriptor is left for one of its sleeping threads";
    return;
  }
  if (number == VMMC_MEMORY) {
    memory_descriptor(e, fd);
    return;
  }
  if (!wake_is_harmless(fd)) {
    endpoint_nonsense(e, "waker %u is no event descriptor", number);
    close(fd);
    return;
  }
  if (e->waker[number] >= 0) close(e->waker[number]);
  e->waker[number] = fd;
  /* Its thread may be asleep already, since before a predecessor's death even, and an event may have come
   * before this: it looks again. */
  wake_waker(e, number);
}

/* From now on only what was sent is delivered.  It is not yet settled. */
static void detach(struct endpoint *e) {
  e->dying = true;
  export_end_all(e);
  for (uint32_t slot = 0; slot < e->own->active_end; slot++) connection_look(e, slot);
  for (uint32_t slot = VMMC_ACTIVE_SLOTS; slot < e->own->passive_end; slot++) connection_look(e, slot);
}

void endpoint_detach(uint32_t index, uint32_t serial, bool may_live) {
  struct endpoint *e = endpoint_find(index, serial);
  if (!e) {
    control_say(VMMC_CONTROL_GONE, index, serial, 0);
    return;
  }
  if (may_live) {
    if (!e->dying) e->wrong = "its daemon was killed before anybody else knew of it";
    return;
  }
  if (e->gone) return;
  e->gone = true;
  if (!e->dying) detach(e);
  give_back_from_dead(e);
  endpoint_settle(e);
}

/* Takes its works out of every queue that they may stand in. */
static void forget_work(struct endpoint *e) {
  for (uint32_t node = 0; node < nic.nodes; node++) {
    struct link *link = nic.link[node];
    if (!link) continue;
    for (uint32_t slot = 0; slot < e->own->active_end; slot++)
      if (e->work[slot].work.queued) link_forget(link, &e->work[slot].work);
    for (uint32_t slot = VMMC_ACTIVE_SLOTS; slot < e->own->passive_end; slot++)
      if (e->work[slot].work.queued) link_forget(link, &e->work[slot].work);
    for (uint32_t i = 0; i < VMMC_COMMANDS; i++)
      if (e->command[i].work.queued) link_forget(link, &e->command[i].work);
  }
}

#define RETIRE(name, meaning) COUNT_IN(&nic.pub->retired, name, atomic_load(&app_header(e)->counters.name));

void endpoint_settle(struct endpoint *e) {
  if (!e->dying || e->own->open) return;
  forget_work(e);
  /* An observer that sees this 0, and afterwards the same again, has seen each endpoint's counters once. */
  atomic_store_explicit(&nic.pub->retiring, e->serial, memory_order_relaxed);
  atomic_thread_fence(memory_order_release); /* before the sums, which stand before its end */
  VMMC_APP_COUNTERS(RETIRE)
  for (uint32_t node = 0; node < nic.nodes; node++) {
    struct packet gone = { .type = PACKET_GONE, .from = { e->index, e->serial, 0, 0 } };
    if (nic.link[node]) link_reply(nic.link[node], &gone);
  }
  utlb_forget(e->serial);
  for (uint32_t i = 0; i < nic.live_count; i++)
    if (nic.live[i] == e->index) nic.live[i--] = nic.live[--nic.live_count];
  nic.endpoint[e->index] = NULL;
  atomic_store_explicit(&nic.pub->endpoint[e->index], 0, memory_order_release);
  atomic_store_explicit(&nic.pub->retiring, 0, memory_order_release);
  control_say(VMMC_CONTROL_GONE, e->index, e->serial, 0);
  unmap(e);
}

/* ---- programs that do what cannot be ---- */

void endpoint_nonsense(struct endpoint *e, const char *format, ...) {
  COUNT(e, commands_rejected, 1);
  if (e->complained) return;
  e->complained = true;
  char what[200];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  log_event("warning", "endpoint %u (pid %d): %s; what more of this kind it does is only counted (commands_rejected)",
            e->index, e->pid, what);
}

/* It is served no more: its connections are reset, and its calls that wait get an error. */
static void expel(struct endpoint *e) {
  log_event("error", "endpoint %u (pid %d) is detached: %s", e->index, e->pid, e->wrong);
  for (int pass = 0; pass < 2; pass++) {
    uint32_t end = pass ? e->own->passive_end : e->own->active_end;
    for (uint32_t slot = pass ? VMMC_ACTIVE_SLOTS : 0; slot < end; slot++) connection_abort(e, slot);
  }
  tell_detached(e, e->wrong);
  control_say(VMMC_CONTROL_EXPELLED, e->index, e->serial, ECONNRESET);
  detach(e);
}

/* ---- doorbells ---- */

/* Its slots that rang.  A share of them: then others have their turn, and it goes on where it stopped. */
static int doorbells(struct endpoint *e) {
  enum { SHARE = 256 };
  struct vmmc_app_header *header = app_header(e);
  uint64_t any = 0;
  for (uint32_t s = 0; s < VMMC_SUMMARY_WORDS; s++)
    any |= atomic_load_explicit(&header->summary[s], memory_order_relaxed);
  if (!any) return 0;
  _Atomic uint64_t *dirty = (_Atomic uint64_t *)(e->app + VMMC_APP_DIRTY);
  uint32_t first = e->next_look;
  int done = 0;
  for (uint32_t n = 0; n <= VMMC_SUMMARY_WORDS; n++) {
    uint32_t s = (first / 64 + n) % VMMC_SUMMARY_WORDS;
    /* It begins in the middle of one, the front part of which comes last. */
    uint64_t part = n == 0 ? ~0ull << first % 64 : n == VMMC_SUMMARY_WORDS ? ~(~0ull << first % 64) : ~0ull;
    /* A plain look first: an exchange would take the line from the program at every turn. */
    if (!(atomic_load_explicit(&header->summary[s], memory_order_relaxed) & part)) continue;
    uint64_t words = atomic_exchange(&header->summary[s], 0);
    if (words & ~part) atomic_fetch_or(&header->summary[s], words & ~part);
    for (words &= part; words; words &= words - 1) {
      uint32_t word = s * 64 + (uint32_t)__builtin_ctzll(words);
      uint64_t bits = done < SHARE ? atomic_exchange(&dirty[word], 0) : 0;
      for (; bits && done < SHARE; bits &= bits - 1)
        done += connection_look(e, word * 64 + (uint32_t)__builtin_ctzll(bits));
      if (done < SHARE) continue;
      if (bits) atomic_fetch_or(&dirty[word], bits);
      atomic_fetch_or(&header->summary[s], words);
      e->next_look = word;
      return done;
    }
  }
  e->next_look = 0;
  return done;
}

int endpoints_work(void) {
  int done = 0;
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    if (!e->dying) done += doorbells(e);
    if (!e->dying) done += commands_work(e);
    if (e->wrong && !e->dying) expel(e);
    if (e->dying && !e->own->open) {
      endpoint_settle(e);
      i--; /* another took its place in the list */
    }
  }
  return done;
}

bool endpoints_have_work(void) {
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    if (e->dying) continue;
    struct vmmc_app_header *header = app_header(e);
    for (uint32_t s = 0; s < VMMC_SUMMARY_WORDS; s++)
      if (atomic_load(&header->summary[s])) return true;
    if (atomic_load(&header->command_tail) != e->commands_taken) return true;
  }
  return false;
}

/* ---- peers' segments ---- */

struct remote *remote_find(uint32_t node, uint32_t serial) {
  struct remote *r;
  for (r = nic.remotes; r; r = r->next)
    if (r->node == node && r->serial == serial) break;
  if (!r) {
    r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->node = node;
    r->serial = serial;
    r->app = map_part(node, serial, "app", VMMC_APP_BYTES, false, NULL);
    if (!r->app) {
      log_event("error", "cannot map the memory of endpoint serial %u of node%u: %s", serial, node, strerror(errno));
      free(r);
      return NULL;
    }
    r->next = nic.remotes;
    nic.remotes = r;
  }
  r->references++;
  return r;
}

static void remote_drop(struct remote *remote) {
  for (struct remote **at = &nic.remotes; *at; at = &(*at)->next) {
    if (*at != remote) continue;
    *at = remote->next;
    munmap(remote->app, VMMC_APP_BYTES);
    free(remote);
    return;
  }
}

void remote_release(struct remote *remote) {
  if (--remote->references == 0 && remote->gone) remote_drop(remote);
}

void remote_gone(uint32_t node, uint32_t serial) {
  for (struct remote *r = nic.remotes; r; r = r->next) {
    if (r->node != node || r->serial != serial) continue;
    r->gone = true;
    if (!r->references) remote_drop(r);
    return;
  }
}

/* That node could not reach us for a while: which of its endpoints have ended since, nobody told. */
void remotes_given_up(uint32_t node) {
  for (struct remote *r = nic.remotes, *next; r; r = next) {
    next = r->next;
    if (r->node != node) continue;
    r->gone = true; /* one that lives is mapped again when it is needed */
    if (!r->references) remote_drop(r);
  }
}

/* What its predecessor said of programs that ended may not have been heard: mappings are made anew when needed. */
void remotes_renew(uint32_t node) {
  for (struct remote *r = nic.remotes, *next; r; r = next) {
    next = r->next;
    if (r->node != node) continue;
    r->gone = true;
    if (!r->references) remote_drop(r);
  }
}
