/*
 * stress: many connections of random sizes and endings, every byte checked at both ends.
 *
 *     stress serve PORT HOW [THREADS]                  until SIGTERM
 *     stress load HOW SEED EXCHANGES AT_ONCE PORT HOST...
 *
 * HOW is how a thread waits: `block` (two threads a connection), `poll`, `select`, `level` or `edge`
 * (epoll).  Each connection begins with a header: how many bytes go there, how many come back, and how
 * it ends.  A load says at the end what it did, and fails when a byte differs or is missing.
 *
 * STRESS_KILL=1: a load kills itself when it has written all of an exchange.  STRESS_BACKLOG: of a server.
 * STRESS_SCALE: a load moves fewer than 2^this bytes (20) each way.
 * STRESS_VICTIM=1: a load is killed by somebody at any moment; its servers accept that it ends early.
 * STRESS_TOLERANT=1: a load's servers are killed; it accepts that, and that none is there.
 * STRESS_ALARM_US: SIGALRM so often; STRESS_RESTART=1: with SA_RESTART.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum ending {
  END_CLEAN,  /* both sides shut down and read to the end */
  END_UNREAD, /* the client closes before it has read all */
  END_KILL,   /* the client's process is killed once all is written */
  END_VICTIM, /* it is killed at any moment */
};
enum how { BLOCK, POLL, SELECT, LEVEL, EDGE };
enum { BLOCK_BYTES = 48 * 1024, PATIENCE_S = 30 };

struct header {
  uint64_t stream, there, back;
  uint32_t ending, magic;
};
enum { MAGIC = 0x73747265 };

struct side { /* one connection at one end */
  int fd;
  bool server;
  struct header header;
  uint64_t read, written, to_read, to_write; /* header included */
  bool read_end, write_end, failed;
  bool connecting;
  uint64_t state; /* random */
};

static volatile uint64_t progress;
static uint64_t exchanges, resets;

static void stop(const char *what, const struct side *s) {
  static const struct side none;
  const char *error = strerror(errno);
  if (!s) s = &none;
  fprintf(stderr, "stress[%d]: %s: %s (%s, read %llu of %llu, written %llu of %llu, ending %u)\n", getpid(), what,
          error, s->server ? "server" : "client", (unsigned long long)s->read, (unsigned long long)s->to_read,
          (unsigned long long)s->written, (unsigned long long)s->to_write, s->header.ending);
  _exit(1);
}

static uint64_t next(uint64_t *state) { /* xorshift64* (Vigna, 2016) */
  *state ^= *state >> 12, *state ^= *state << 25, *state ^= *state >> 27;
  return *state * 2685821657736338717u;
}
static uint8_t byte_at(uint64_t stream, uint64_t position) {
  uint64_t x = (position + 1) * 0x9e3779b97f4a7c15u ^ stream * 0xff51afd7ed558ccdu;
  return (uint8_t)(x >> 56);
}

/* What this side writes at `position`. */
static uint8_t outgoing(const struct side *s, uint64_t position) {
  if (s->server) return byte_at(s->header.stream + 1, position);
  if (position < sizeof s->header) return ((const uint8_t *)&s->header)[position];
  return byte_at(s->header.stream, position - sizeof s->header);
}

static void header_known(struct side *s) {
  if (s->header.magic != MAGIC) stop("a header differs", s);
  s->to_read = sizeof s->header + s->header.there;
  s->to_write = s->header.back;
}

static void check(struct side *s, const uint8_t *block, uint64_t length) {
  for (uint64_t i = 0; i < length; i++, s->read++) {
    if (s->server && s->read < sizeof s->header) {
      ((uint8_t *)&s->header)[s->read] = block[i];
      if (s->read + 1 == sizeof s->header) header_known(s);
      continue;
    }
    uint8_t expected = s->server ? byte_at(s->header.stream, s->read - sizeof s->header)
                                 : byte_at(s->header.stream + 1, s->read);
    if (block[i] != expected) errno = EIO, stop("a byte differs", s);
  }
  if (s->server && s->read > sizeof s->header && s->read > s->to_read) errno = EIO, stop("too many bytes", s);
  if (!s->server && s->read > s->to_read) errno = EIO, stop("too many bytes", s);
}

static bool may_break(const struct side *s) { return s->server && s->header.ending != END_CLEAN; }

static bool tolerant; /* the servers of this load are killed */

/* The other side may have been killed at any moment: it may end anywhere, yet no byte may differ. */
static bool may_vanish(const struct side *s) {
  if (!s->server) return tolerant;
  return s->read < sizeof s->header || s->header.ending == END_VICTIM;
}

/* What is said of a program that was killed, or of a node that lost its power. */
static bool vanished(int error) {
  return error == ECONNRESET || error == EPIPE || error == ECONNREFUSED || error == ETIMEDOUT || error == EHOSTUNREACH;
}

/* The connection broke, or the stream ended: was that to be? */
static void read_ended(struct side *s, int error) {
  s->read_end = true;
  if (may_vanish(s) && (!error || vanished(error))) {
    if (error || s->read != s->to_read) s->failed = s->write_end = true;
    return;
  }
  if (error) {
    s->failed = true;
    errno = error;
    /* Closed with bytes unread: a reset, which overtakes what was sent, as Linux has it.  Killed with nothing
     * unread: all that was sent, and the end. */
    if (!s->server || s->header.ending != END_UNREAD || error != ECONNRESET) stop("read", s);
    __atomic_fetch_add(&resets, 1, __ATOMIC_RELAXED);
    return;
  }
  if (s->server && s->read == 0) { /* the client was killed before it wrote */
    s->write_end = true;
    return;
  }
  errno = EIO;
  if (s->server && s->header.ending == END_UNREAD) return;
  if (s->read != s->to_read) stop("bytes are missing", s);
}

/* True: moved something or ended. */
static bool read_some(struct side *s) {
  uint8_t block[BLOCK_BYTES];
  if (s->read_end) return false;
  uint64_t want = next(&s->state) % sizeof block + 1;
  if (s->server && s->read < sizeof s->header) want = sizeof s->header - s->read;
  ssize_t n = next(&s->state) % 2 ? read(s->fd, block, want) : recv(s->fd, block, want, 0);
  if (n < 0 && errno == EINTR) return true;
  if (n < 0 && errno == EAGAIN) return false;
  progress++;
  if (n <= 0)
    read_ended(s, n ? errno : 0);
  else
    check(s, block, (uint64_t)n);
  return true;
}

static bool write_some(struct side *s) {
  uint8_t block[BLOCK_BYTES];
  if (s->write_end) return false;
  uint64_t length = next(&s->state) % sizeof block + 1;
  if (next(&s->state) % 4 == 0) length = length % 16 + 1;
  if (length > s->to_write - s->written) length = s->to_write - s->written;
  for (uint64_t i = 0; i < length; i++) block[i] = outgoing(s, s->written + i);
  if (length) {
    ssize_t n = next(&s->state) % 2 ? write(s->fd, block, length) : send(s->fd, block, length, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) return true;
    if (n < 0 && errno == EAGAIN) return false;
    progress++;
    if (n < 0) {
      bool expected = may_vanish(s) ? vanished(errno) : may_break(s) && (errno == EPIPE || errno == ECONNRESET);
      if (!expected) stop("write", s);
      s->failed = s->write_end = true;
      return true;
    }
    s->written += (uint64_t)n;
  }
  if (s->written < s->to_write || (s->server && s->read < sizeof s->header)) return true;
  if (!s->server && s->header.ending == END_KILL) raise(SIGKILL);
  s->write_end = true;
  if (shutdown(s->fd, SHUT_WR) < 0 && !may_break(s) && !may_vanish(s)) stop("shutdown", s);
  return true;
}

/* Nothing left to do but to close. */
static bool done(const struct side *s) {
  if (!s->server && s->header.ending == END_UNREAD && s->write_end && s->read >= s->header.back / 2) return true;
  return s->failed || (s->read_end && s->write_end);
}

static bool wants_write(const struct side *s) { return !s->write_end && (!s->server || s->read >= sizeof s->header); }

static void finish(struct side *s) {
  if (close(s->fd) < 0) stop("close", s);
  progress++;
  __atomic_fetch_add(&exchanges, 1, __ATOMIC_RELAXED);
}

/* ---- beginning ---- */

static void nonblocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

static struct sockaddr_in *targets;
static unsigned target_count;
static uint64_t seed, scale_end = 21;

static void begin_client(struct side *s, enum how how, uint64_t number) {
  *s = (struct side){ .state = (seed << 32) + number * 7919 + 1 };
  uint64_t scale = 1ull << next(&s->state) % scale_end;
  s->header = (struct header){ seed * 1000003 + number * 2, next(&s->state) % scale, next(&s->state) % scale,
                               (uint32_t)(next(&s->state) % END_KILL), MAGIC };
  if (getenv("STRESS_VICTIM")) s->header.ending = END_VICTIM;
  if (getenv("STRESS_KILL")) s->header.ending = END_KILL, s->header.back = 0;
  s->to_read = s->header.back;
  s->to_write = sizeof s->header + s->header.there;
  s->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (s->fd < 0) stop("socket", s);
  if (how != BLOCK) nonblocking(s->fd);
  const struct sockaddr_in *target = &targets[next(&s->state) % target_count];
  int error;
  do error = connect(s->fd, (const void *)target, sizeof *target) < 0 ? errno : 0;
  while (error == EINTR && how != BLOCK);
  if (error == EINTR) { /* goes on without us */
    struct pollfd p = { s->fd, POLLOUT, 0 };
    while (poll(&p, 1, -1) < 0) {}
    socklen_t size = sizeof error;
    getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size);
  }
  s->connecting = error == EINPROGRESS || error == EALREADY;
  if (tolerant && vanished(error)) {
    close(s->fd);
    s->fd = -1;
    progress++;
    usleep(20000); /* until there is a server again */
    return;
  }
  if (error && !s->connecting) errno = error, stop("connect", s);
}

static void connected(struct side *s) {
  int error;
  socklen_t size = sizeof error;
  if (getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0) stop("getsockopt", s);
  s->connecting = false;
  if (tolerant && vanished(error)) {
    s->failed = true;
    usleep(20000);
  } else if (error) {
    errno = error, stop("connect", s);
  }
}

static void begin_server(struct side *s, int fd, enum how how) {
  static uint64_t count;
  *s = (struct side){ .fd = fd, .server = true, .state = __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED) * 104729 + 1,
                      .to_read = sizeof s->header, .to_write = UINT64_MAX };
  if (how != BLOCK) nonblocking(fd);
}

/* ---- blocking: a thread each way ---- */

static void *write_all(void *argument) {
  struct side *s = argument;
  while (!s->write_end && !s->failed) write_some(s);
  return NULL;
}

static void run_blocking(struct side *s) {
  while (s->server && s->read < sizeof s->header && !s->read_end) read_some(s);
  if (s->failed || s->read_end) {
    finish(s);
    return;
  }
  pthread_t writer;
  struct side w = *s; /* the two directions share nothing but the descriptor */
  w.state += 17;
  if (pthread_create(&writer, NULL, write_all, &w)) stop("thread", s);
  while (!s->read_end && !(s->header.ending == END_UNREAD && !s->server && s->read >= s->header.back / 2)) read_some(s);
  pthread_join(writer, NULL);
  finish(s);
}

/* ---- a loop over many ---- */

struct loop {
  enum how how;
  int epoll, listener;
  struct side *side;
  unsigned count, size;
  uint64_t first, step, end; /* numbers of the exchanges to begin */
};

static bool step(struct side *s, bool edge) {
  if (s->connecting) return false;
  if (s->failed) return true;
  bool any = false;
  do {
    any = read_some(s);
    if (wants_write(s)) any |= write_some(s);
    if (done(s)) return true;
  } while (any && edge);
  return false;
}

static void watch(struct loop *l, unsigned i) {
  struct side *s = &l->side[i];
  struct epoll_event event = { .events = EPOLLIN, .data.u32 = i };
  if (l->how == EDGE) event.events = EPOLLIN | EPOLLOUT | EPOLLET;
  else if (s->connecting || wants_write(s)) event.events |= EPOLLOUT;
  if (s->read_end && l->how == LEVEL) event.events &= ~(uint32_t)EPOLLIN;
  if (epoll_ctl(l->epoll, EPOLL_CTL_MOD, s->fd, &event) < 0 && epoll_ctl(l->epoll, EPOLL_CTL_ADD, s->fd, &event) < 0)
    stop("epoll_ctl", s);
}

static void handle(struct loop *l, unsigned i, bool writable) {
  struct side *s = &l->side[i];
  if (s->fd < 0) return;
  if (s->connecting) {
    if (!writable) return;
    connected(s);
  }
  if (step(s, l->how == EDGE)) {
    finish(s);
    s->fd = -1;
    l->count--;
  } else if (l->how == LEVEL) {
    watch(l, i);
  }
}

static struct side *vacant(struct loop *l, unsigned *index) {
  for (unsigned i = 0; i < l->size; i++)
    if (l->side[i].fd < 0) return *index = i, &l->side[i];
  return NULL;
}

static void accept_some(struct loop *l) {
  unsigned i;
  for (struct side *s; (s = vacant(l, &i));) {
    int fd = accept4(l->listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (fd < 0 && errno == EAGAIN) return;
    if (fd < 0) stop("accept", NULL);
    begin_server(s, fd, l->how);
    l->count++;
    if (l->how >= LEVEL) watch(l, i);
  }
}

static void wait_epoll(struct loop *l, bool accepting) {
  struct epoll_event event[64], listening = { .events = accepting ? EPOLLIN : 0, .data.u32 = UINT32_MAX };
  if (l->listener >= 0) epoll_ctl(l->epoll, EPOLL_CTL_MOD, l->listener, &listening);
  int n = epoll_wait(l->epoll, event, 64, -1);
  for (int i = 0; i < n; i++) {
    if (event[i].data.u32 == UINT32_MAX) accept_some(l);
    else handle(l, event[i].data.u32, event[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP));
  }
}

static void wait_poll(struct loop *l, bool accepting) {
  struct pollfd p[1025];
  unsigned index[1025], n = 0;
  if (accepting) p[n++] = (struct pollfd){ l->listener, POLLIN, 0 };
  for (unsigned i = 0; i < l->size; i++) {
    struct side *s = &l->side[i];
    if (s->fd < 0) continue;
    index[n] = i;
    int events = (s->read_end ? 0 : POLLIN) | (s->connecting || wants_write(s) ? POLLOUT : 0);
    p[n++] = (struct pollfd){ s->fd, (short)events, 0 };
  }
  if (poll(p, n, -1) < 0) return;
  for (unsigned i = 0; i < n; i++) {
    if (!p[i].revents) continue;
    if (accepting && i == 0) accept_some(l);
    else handle(l, index[i], p[i].revents & (POLLOUT | POLLERR | POLLHUP));
  }
}

static void wait_select(struct loop *l, bool accepting) {
  fd_set in, out;
  FD_ZERO(&in);
  FD_ZERO(&out);
  int top = -1;
  if (accepting) FD_SET(l->listener, &in), top = l->listener;
  for (unsigned i = 0; i < l->size; i++) {
    struct side *s = &l->side[i];
    if (s->fd < 0) continue;
    if (!s->read_end) FD_SET(s->fd, &in);
    if (s->connecting || wants_write(s)) FD_SET(s->fd, &out);
    if (s->fd > top) top = s->fd;
  }
  if (select(top + 1, &in, &out, NULL, NULL) < 0) return;
  if (accepting && FD_ISSET(l->listener, &in)) accept_some(l);
  for (unsigned i = 0; i < l->size; i++) {
    int fd = l->side[i].fd;
    if (fd >= 0 && (FD_ISSET(fd, &in) || FD_ISSET(fd, &out))) handle(l, i, FD_ISSET(fd, &out));
  }
}

static volatile sig_atomic_t ending;

static void run_loop(struct loop *l) {
  l->side = calloc(l->size, sizeof *l->side);
  for (unsigned i = 0; i < l->size; i++) l->side[i].fd = -1;
  l->epoll = epoll_create1(EPOLL_CLOEXEC);
  if (l->listener >= 0) {
    nonblocking(l->listener);
    struct epoll_event event = { .events = EPOLLIN, .data.u32 = UINT32_MAX };
    if (l->how >= LEVEL) epoll_ctl(l->epoll, EPOLL_CTL_ADD, l->listener, &event);
  }
  while (!ending) {
    unsigned i;
    for (struct side *s; l->first < l->end && (s = vacant(l, &i)); l->first += l->step) {
      begin_client(s, l->how, l->first);
      if (s->fd < 0) continue;
      l->count++;
      if (l->how >= LEVEL) watch(l, i);
    }
    if (l->listener < 0 && !l->count) break;
    bool accepting = l->listener >= 0 && l->count < l->size;
    if (l->how == POLL) wait_poll(l, accepting);
    else if (l->how == SELECT) wait_select(l, accepting);
    else wait_epoll(l, accepting);
  }
  close(l->epoll);
  free(l->side);
}

/* ---- main ---- */

static enum how how_of(const char *name) {
  static const char *names[] = { "block", "poll", "select", "level", "edge" };
  for (int i = 0; i < 5; i++)
    if (!strcmp(name, names[i])) return (enum how)i;
  fprintf(stderr, "stress: %s?\n", name);
  exit(2);
}

struct worker { enum how how; int listener; uint64_t first, step, end; };

static void *serve_one(void *argument) {
  struct side s;
  begin_server(&s, (int)(intptr_t)argument, BLOCK);
  run_blocking(&s);
  return NULL;
}

static void *serve(void *argument) {
  struct worker *w = argument;
  if (w->how != BLOCK) {
    struct loop l = { .how = w->how, .listener = w->listener, .size = w->how == SELECT ? 100 : 1000 };
    run_loop(&l);
    return NULL;
  }
  while (!ending) {
    int fd = accept(w->listener, NULL, NULL);
    if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (fd < 0) stop("accept", NULL);
    pthread_t thread;
    if (pthread_create(&thread, NULL, serve_one, (void *)(intptr_t)fd)) stop("thread", NULL);
    pthread_detach(thread);
  }
  return NULL;
}

static void *load(void *argument) {
  struct worker *w = argument;
  for (uint64_t i = w->first; i < w->end; i += w->step) {
    struct side s;
    begin_client(&s, BLOCK, i);
    if (s.fd >= 0) run_blocking(&s);
  }
  return NULL;
}

static void on_alarm(int number) { (void)number; }
static void on_end(int number) {
  (void)number;
  printf("%llu exchanges, %llu resets\n", (unsigned long long)exchanges, (unsigned long long)resets);
  fflush(stdout);
  _exit(0);
}

static void *patience(void *argument) { /* a hang is a failure that says where */
  uint64_t before = progress;
  sigset_t alarms;
  sigemptyset(&alarms);
  sigaddset(&alarms, SIGALRM); /* would end its sleep */
  pthread_sigmask(SIG_BLOCK, &alarms, NULL);
  for (;;) {
    sleep(PATIENCE_S);
    if (progress == before) {
      fprintf(stderr, "stress[%d]: no progress in %d s after %llu exchanges\n", getpid(), PATIENCE_S,
              (unsigned long long)exchanges);
      if (getenv("STRESS_STOP")) pause(); /* for a debugger */
      _exit(3);
    }
    before = progress;
  }
  return argument;
}

static void alarms(void) {
  const char *us = getenv("STRESS_ALARM_US");
  if (!us) return;
  struct sigaction action = { .sa_handler = on_alarm, .sa_flags = getenv("STRESS_RESTART") ? SA_RESTART : 0 };
  sigaction(SIGALRM, &action, NULL);
  struct itimerval every = { { 0, atoi(us) }, { 0, atoi(us) } };
  setitimer(ITIMER_REAL, &every, NULL);
}

int main(int count, char **argument) {
  signal(SIGPIPE, SIG_IGN);
  pthread_t thread[64];
  struct worker worker[64];
  if (count >= 4 && !strcmp(argument[1], "serve")) {
    signal(SIGTERM, on_end);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argument[2])) };
    int one = 1, threads = count > 4 ? atoi(argument[4]) : 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    const char *backlog = getenv("STRESS_BACKLOG");
    if (bind(fd, (void *)&address, sizeof address) < 0 || listen(fd, backlog ? atoi(backlog) : 128) < 0)
      stop("listen", NULL);
    puts("ready");
    fflush(stdout);
    alarms();
    for (int i = 0; i < threads; i++) {
      worker[i] = (struct worker){ .how = how_of(argument[3]), .listener = fd };
      pthread_create(&thread[i], NULL, serve, &worker[i]);
    }
    for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    return 0;
  }
  if (count < 8 || strcmp(argument[1], "load")) return 2;
  enum how how = how_of(argument[2]);
  seed = strtoull(argument[3], NULL, 10);
  uint64_t total = strtoull(argument[4], NULL, 10);
  unsigned at_once = (unsigned)atoi(argument[5]);
  target_count = (unsigned)count - 7;
  tolerant = getenv("STRESS_TOLERANT");
  if (getenv("STRESS_SCALE")) scale_end = strtoull(getenv("STRESS_SCALE"), NULL, 10) + 1;
  targets = calloc(target_count, sizeof *targets);
  for (unsigned i = 0; i < target_count; i++) {
    struct addrinfo hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM }, *found;
    if (getaddrinfo(argument[7 + i], argument[6], &hints, &found)) stop("getaddrinfo", NULL);
    memcpy(&targets[i], found->ai_addr, sizeof targets[i]);
    freeaddrinfo(found);
  }
  pthread_t watcher;
  pthread_create(&watcher, NULL, patience, NULL);
  alarms();
  if (how == BLOCK) {
    for (unsigned i = 0; i < at_once; i++) {
      worker[i] = (struct worker){ how, -1, i, at_once, total };
      pthread_create(&thread[i], NULL, load, &worker[i]);
    }
    for (unsigned i = 0; i < at_once; i++) pthread_join(thread[i], NULL);
  } else {
    struct loop l = { .how = how, .listener = -1, .size = at_once, .step = 1, .end = total };
    run_loop(&l);
  }
  printf("%llu exchanges, %llu resets\n", (unsigned long long)exchanges, (unsigned long long)resets);
  return 0;
}
