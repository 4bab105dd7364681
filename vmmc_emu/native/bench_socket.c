/*
 * vmmc-bench: an ordinary socket program that measures.
 *
 * It knows nothing of VMMC: the same binary runs over kernel TCP and, started on a node, over VMMC.
 *
 *     vmmc-bench server PORT                          serves until it is killed; port 0: any
 *     vmmc-bench latency HOST PORT BYTES SECONDS      ping-pong of BYTES
 *     vmmc-bench stream HOST PORT BYTES SECONDS       one direction, BYTES a write
 *     vmmc-bench asked HOST PORT BYTES SECONDS        BYTES each time that vmmc-bench-receive asks for them
 *     vmmc-bench connect HOST PORT SECONDS            connects, exchanges a byte and closes, again and again
 *     vmmc-bench hold HOST PORT COUNT                 COUNT connections that do nothing, until stdin ends
 *     vmmc-bench pair latency|stream BYTES SECONDS    the same over an AF_UNIX socket pair, with a child
 *     vmmc-bench ring lead|pass                       one of a ring of programs that pass a byte around
 *     vmmc-bench spin                                 takes all CPU time it gets, while its parent lives
 *
 * A server says "listening PORT" when it does.  A client prints one line of JSON.  A ring's members are
 * servers too; each is told on stdin the next one's "HOST PORT", says "linked" when it is, and the leader then
 * answers each line of SECONDS with a line of JSON.
 */
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum kind { LATENCY, STREAM, HOLD, ASKED };

/* What a client sends first, in network order: its first byte is 0.  Any other first byte is sent back, and
 * that was the conversation. */
struct opening {
  uint32_t kind; /* enum kind */
  uint32_t size; /* bytes a write */
};

enum {
  LARGEST = 64 << 20,   /* bytes that a client may ask for */
  TRIPS_KEPT = 1 << 20, /* trips whose time is kept for the percentiles */
  CLOCK_BYTES = 65536,  /* a stream's clock is read once in so many bytes, or */
  CLOCK_WRITES = 256,   /* so many writes: reading it costs as much as a small write */
};
/* Part of the time that runs before the clock counts: caches, windows and pages settle. */
static const double WARM_UP = 0.2;

static void fail(const char *what) {
  fprintf(stderr, "vmmc-bench: %s: %s\n", what, strerror(errno));
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void send_all(int fd, const char *from, size_t length) {
  while (length > 0) {
    ssize_t sent = send(fd, from, length, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) fail("send");
    from += sent, length -= (size_t)sent;
  }
}

/* Bytes received: `length`, or fewer at the end of the stream. */
static size_t receive_all(int fd, char *into, size_t length) {
  size_t got = 0;
  while (got < length) {
    ssize_t n = recv(fd, into + got, length - got, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("recv");
    if (n == 0) break;
    got += (size_t)n;
  }
  return got;
}

static void send_at_once(int fd) {
  int one = 1;
  if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0) fail("setsockopt TCP_NODELAY");
}

static char *filled_block(size_t size) {
  char *block = malloc(size);
  if (!block) fail("malloc");
  for (size_t i = 0; i < size; i++) block[i] = (char)(i * 31 + i / 251);
  return block;
}

/* ---- server -------------------------------------------------------------------------------------- */

/* True: the connection is to be kept, and nothing is to be done about it. */
static bool serve(int fd) {
  struct opening opening;
  char *bytes = (char *)&opening;
  if (receive_all(fd, bytes, 1) != 1) return false; /* somebody who only looks */
  if (bytes[0]) {
    send_all(fd, bytes, 1);
    receive_all(fd, bytes, 1); /* the client closes first */
    return false;
  }
  if (receive_all(fd, bytes + 1, sizeof opening - 1) != sizeof opening - 1) return false;
  if (ntohl(opening.kind) == HOLD) return true;
  size_t size = ntohl(opening.size);
  if (size == 0 || size > LARGEST) {
    fprintf(stderr, "vmmc-bench: a client asked for %zu bytes, at most %d are served\n", size, LARGEST);
    return false;
  }
  char *block = filled_block(size);
  if (ntohl(opening.kind) == LATENCY) {
    while (receive_all(fd, block, size) == size) send_all(fd, block, size);
  } else {
    uint64_t total = 0;
    ssize_t n;
    while ((n = recv(fd, block, size, 0)) > 0) total += (uint64_t)n;
    if (n < 0) fail("recv");
    send_all(fd, (char *)&total, sizeof total);
  }
  free(block);
  return false;
}

/* A socket that listens, after saying where. */
static int listen_on(const char *port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
  socklen_t length = sizeof address;
  int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
  if (listener < 0) fail("socket");
  if (setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0) fail("setsockopt SO_REUSEADDR");
  if (bind(listener, (struct sockaddr *)&address, length) < 0) fail("bind");
  if (listen(listener, 128) < 0) fail("listen");
  if (getsockname(listener, (struct sockaddr *)&address, &length) < 0) fail("getsockname");
  printf("listening %d\n", ntohs(address.sin_port));
  fflush(stdout);
  return listener;
}

static int accept_one(int listener) {
  for (;;) {
    int fd = accept(listener, NULL, NULL);
    if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (fd < 0) fail("accept");
    send_at_once(fd);
    return fd;
  }
}

static void run_server(const char *port) {
  int listener = listen_on(port);
  for (;;) {
    int fd = accept_one(listener);
    if (!serve(fd)) close(fd);
  }
}

/* ---- client -------------------------------------------------------------------------------------- */

static struct addrinfo *resolve(const char *host, const char *port) {
  struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found;
  int error = getaddrinfo(host, port, &hints, &found);
  if (error) {
    fprintf(stderr, "vmmc-bench: %s: %s\n", host, gai_strerror(error));
    exit(1);
  }
  return found;
}

static int connect_found(const struct addrinfo *found) {
  int fd = socket(found->ai_family, found->ai_socktype, 0);
  if (fd < 0) fail("socket");
  if (connect(fd, found->ai_addr, found->ai_addrlen) < 0) fail("connect");
  send_at_once(fd);
  return fd;
}

static int connect_to(const char *host, const char *port) {
  struct addrinfo *found = resolve(host, port);
  int fd = connect_found(found);
  freeaddrinfo(found);
  return fd;
}

static void open_with(int fd, enum kind kind, size_t size) {
  struct opening opening = {htonl(kind), htonl((uint32_t)size)};
  send_all(fd, (char *)&opening, sizeof opening);
}

static int compare(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void measure_latency(int fd, size_t size, double seconds) {
  char *block = filled_block(size), *echo = malloc(size);
  float *trip = malloc(TRIPS_KEPT * sizeof *trip);
  if (!echo || !trip) fail("malloc");
  double begin = now(), start = begin + seconds * WARM_UP, before = begin;
  uint64_t trips = 0;
  while (before < begin + seconds || trips == 0) {
    send_all(fd, block, size);
    if (receive_all(fd, echo, size) != size) {
      fprintf(stderr, "vmmc-bench: the server ended the connection\n");
      exit(1);
    }
    double after = now();
    if (before >= start) trip[trips++ % TRIPS_KEPT] = (float)((after - before) * 1e6);
    else start = after > start ? after : start; /* the clock starts with a whole trip */
    before = after;
  }
  if (memcmp(block, echo, size)) {
    fprintf(stderr, "vmmc-bench: what came back is not what was sent\n");
    exit(1);
  }
  size_t kept = trips < TRIPS_KEPT ? trips : TRIPS_KEPT;
  qsort(trip, kept, sizeof *trip, compare);
  printf("{\"kind\": \"latency\", \"size\": %zu, \"trips\": %llu, \"seconds\": %.6f, \"one_way_us\": %.3f, "
         "\"median_us\": %.3f, \"p99_us\": %.3f}\n",
         size, (unsigned long long)trips, before - start, (before - start) / (double)trips / 2 * 1e6,
         trip[kept / 2] / 2, trip[kept * 99 / 100] / 2);
}

static void measure_stream(int fd, size_t size, double seconds) {
  char *block = filled_block(size);
  size_t writes_a_look = size >= CLOCK_BYTES ? 1 : CLOCK_BYTES / size < CLOCK_WRITES ? CLOCK_BYTES / size : CLOCK_WRITES;
  double begin = now(), start = 0;
  uint64_t writes = 0, writes_before = 0; /* in all, and when the clock started */
  for (double t = begin; t < begin + seconds || !start || writes == writes_before; t = now()) {
    if (!start && t >= begin + seconds * WARM_UP) start = t, writes_before = writes;
    for (size_t i = 0; i < writes_a_look; i++) send_all(fd, block, size);
    writes += writes_a_look;
  }
  if (shutdown(fd, SHUT_WR) < 0) fail("shutdown");
  uint64_t total;
  if (receive_all(fd, (char *)&total, sizeof total) != sizeof total || total != writes * size) {
    fprintf(stderr, "vmmc-bench: the server did not receive what was sent\n");
    exit(1);
  }
  double elapsed = now() - start;
  writes -= writes_before;
  printf("{\"kind\": \"stream\", \"size\": %zu, \"writes\": %llu, \"bytes\": %llu, \"seconds\": %.6f}\n", size,
         (unsigned long long)writes, (unsigned long long)(writes * size), elapsed);
}

/* Each block is asked for by the receiver, just before it receives: the clock stands when it asks again. */
static void measure_asked(int fd, size_t size, double seconds) {
  char *block = filled_block(size), ask;
  double begin = now(), start = 0, t = begin;
  uint64_t blocks = 0, blocks_before = 0; /* in all, and when the clock started */
  for (;; blocks++) {
    if (receive_all(fd, &ask, 1) != 1) fail("the server ended the connection");
    t = now();
    if (!start && t >= begin + seconds * WARM_UP) start = t, blocks_before = blocks;
    else if (t >= begin + seconds && blocks > blocks_before) break;
    send_all(fd, block, size);
  }
  if (shutdown(fd, SHUT_WR) < 0) fail("shutdown");
  uint64_t total;
  if (receive_all(fd, (char *)&total, sizeof total) != sizeof total || total != blocks * size) {
    fprintf(stderr, "vmmc-bench: the server did not receive what was sent\n");
    exit(1);
  }
  blocks -= blocks_before;
  printf("{\"kind\": \"asked\", \"size\": %zu, \"writes\": %llu, \"bytes\": %llu, \"seconds\": %.6f}\n", size,
         (unsigned long long)blocks, (unsigned long long)(blocks * size), t - start);
}

static void measure(int fd, enum kind kind, size_t size, double seconds) {
  open_with(fd, kind, size);
  if (kind == LATENCY) measure_latency(fd, size, seconds);
  else if (kind == ASKED) measure_asked(fd, size, seconds);
  else measure_stream(fd, size, seconds);
  close(fd);
}

static void measure_connects(const char *host, const char *port, double seconds) {
  struct addrinfo *found = resolve(host, port);
  double begin = now(), start = 0, t = begin;
  uint64_t connects = 0;
  for (; t < begin + seconds || !connects; t = now()) {
    if (!start && t >= begin + seconds * WARM_UP) start = t, connects = 0;
    char byte = 'x';
    int fd = connect_found(found);
    send_all(fd, &byte, 1);
    if (receive_all(fd, &byte, 1) != 1 || byte != 'x') {
      fprintf(stderr, "vmmc-bench: the server did not send the byte back\n");
      exit(1);
    }
    close(fd);
    connects++;
  }
  printf("{\"kind\": \"connect\", \"connects\": %llu, \"seconds\": %.6f}\n", (unsigned long long)connects,
         t - (start ? start : begin));
  freeaddrinfo(found);
}

static void hold(const char *host, const char *port, int count) {
  for (int i = 0; i < count; i++) open_with(connect_to(host, port), HOLD, 0);
  printf("holding %d\n", count);
  fflush(stdout);
  char byte;
  while (read(STDIN_FILENO, &byte, 1) > 0) {}
}

/* A socket pair passes to the kernel, on a node as well. */
static void measure_pair(enum kind kind, size_t size, double seconds) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0) fail("socketpair");
  pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    close(pair[0]);
    serve(pair[1]);
    _exit(0);
  }
  close(pair[1]);
  measure(pair[0], kind, size, seconds);
  if (waitpid(child, NULL, 0) < 0) fail("waitpid");
}

/* ---- a ring -------------------------------------------------------------------------------------- */

static void lead(int previous, int next) {
  char line[64], token = 't';
  while (fgets(line, sizeof line, stdin)) {
    double seconds = atof(line), begin = now(), start = 0, t = begin;
    uint64_t rounds = 0;
    for (; t < begin + seconds || !rounds; t = now()) {
      if (!start && t >= begin + seconds * WARM_UP) start = t, rounds = 0;
      send_all(next, &token, 1);
      if (receive_all(previous, &token, 1) != 1) {
        fprintf(stderr, "vmmc-bench: the ring is broken\n");
        exit(1);
      }
      rounds++;
    }
    printf("{\"kind\": \"ring\", \"rounds\": %llu, \"seconds\": %.6f}\n", (unsigned long long)rounds,
           t - (start ? start : begin));
    fflush(stdout);
  }
}

static void run_ring(bool leads) {
  int listener = listen_on("0");
  char line[512], host[256], port[16];
  if (!fgets(line, sizeof line, stdin) || sscanf(line, "%255s %15s", host, port) != 2) {
    fprintf(stderr, "vmmc-bench: stdin does not say who is next\n");
    exit(1);
  }
  int next = connect_to(host, port), previous = accept_one(listener);
  printf("linked\n");
  fflush(stdout);
  char token;
  if (leads) lead(previous, next);
  else
    while (receive_all(previous, &token, 1) == 1) send_all(next, &token, 1);
}

static void spin(void) {
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0) fail("prctl");
  for (volatile uint64_t turns = 0;; turns++) {}
}

static int usage(void) {
  fprintf(stderr, "usage: vmmc-bench server PORT\n"
                  "       vmmc-bench latency|stream|asked HOST PORT BYTES SECONDS\n"
                  "       vmmc-bench connect HOST PORT SECONDS\n"
                  "       vmmc-bench hold HOST PORT COUNT\n"
                  "       vmmc-bench pair latency|stream BYTES SECONDS\n"
                  "       vmmc-bench ring lead|pass\n"
                  "       vmmc-bench spin\n");
  return 2;
}

int main(int argc, char **argv) {
  const char *mode = argc > 1 ? argv[1] : "";
  bool pair = argc == 5 && !strcmp(mode, "pair");
  const char *what = pair ? argv[2] : mode;
  bool latency = !strcmp(what, "latency"), stream = !strcmp(what, "stream"), asked = !pair && !strcmp(what, "asked");
  if ((pair || argc == 6) && (latency || stream || asked)) {
    const char *bytes = argv[argc - 2];
    double seconds = atof(argv[argc - 1]);
    enum kind kind = latency ? LATENCY : asked ? ASKED : STREAM;
    long size = atol(bytes);
    if (size < 1 || size > LARGEST) {
      fprintf(stderr, "vmmc-bench: BYTES is %s, must be 1 to %d\n", bytes, LARGEST);
      return 2;
    }
    if (pair) measure_pair(kind, (size_t)size, seconds);
    else measure(connect_to(argv[2], argv[3]), kind, (size_t)size, seconds);
  } else if (argc == 3 && !strcmp(mode, "server")) run_server(argv[2]);
  else if (argc == 5 && !strcmp(mode, "connect")) measure_connects(argv[2], argv[3], atof(argv[4]));
  else if (argc == 5 && !strcmp(mode, "hold")) hold(argv[2], argv[3], atoi(argv[4]));
  else if (argc == 3 && !strcmp(mode, "ring") && (!strcmp(argv[2], "lead") || !strcmp(argv[2], "pass")))
    run_ring(argv[2][0] == 'l');
  else if (argc == 2 && !strcmp(mode, "spin")) spin();
  else return usage();
  return 0;
}
