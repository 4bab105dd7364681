/*
 * vmmc-bench: an ordinary socket program that measures.
 *
 * It knows nothing of VMMC: the same binary runs over kernel TCP and, started on a node, over VMMC.
 *
 *     vmmc-bench server PORT                          serves until it is killed; port 0: any
 *     vmmc-bench latency HOST PORT BYTES SECONDS      ping-pong of BYTES
 *     vmmc-bench stream HOST PORT BYTES SECONDS       one direction, BYTES a write
 *
 * The server says "listening PORT" when it does.  A client prints one line of JSON.
 */
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum kind { LATENCY, STREAM };

/* What a client sends first, in network order. */
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

static void serve(int fd) {
  struct opening opening;
  if (receive_all(fd, (char *)&opening, sizeof opening) != sizeof opening) return; /* somebody who only looks */
  size_t size = ntohl(opening.size);
  if (size == 0 || size > LARGEST) {
    fprintf(stderr, "vmmc-bench: a client asked for %zu bytes, at most %d are served\n", size, LARGEST);
    return;
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
}

static void run_server(const char *port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
  socklen_t length = sizeof address;
  int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
  if (listener < 0) fail("socket");
  if (setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0) fail("setsockopt SO_REUSEADDR");
  if (bind(listener, (struct sockaddr *)&address, length) < 0) fail("bind");
  if (listen(listener, 16) < 0) fail("listen");
  if (getsockname(listener, (struct sockaddr *)&address, &length) < 0) fail("getsockname");
  printf("listening %d\n", ntohs(address.sin_port));
  fflush(stdout);
  for (;;) {
    int fd = accept(listener, NULL, NULL);
    if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (fd < 0) fail("accept");
    send_at_once(fd);
    serve(fd);
    close(fd);
  }
}

/* ---- client -------------------------------------------------------------------------------------- */

static int connect_to(const char *host, const char *port) {
  struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found;
  int error = getaddrinfo(host, port, &hints, &found);
  if (error) {
    fprintf(stderr, "vmmc-bench: %s: %s\n", host, gai_strerror(error));
    exit(1);
  }
  int fd = socket(found->ai_family, found->ai_socktype, 0);
  if (fd < 0) fail("socket");
  if (connect(fd, found->ai_addr, found->ai_addrlen) < 0) fail("connect");
  freeaddrinfo(found);
  send_at_once(fd);
  return fd;
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

int main(int argc, char **argv) {
  if (argc == 3 && !strcmp(argv[1], "server")) run_server(argv[2]);
  int latency = argc == 6 && !strcmp(argv[1], "latency");
  if (!latency && (argc != 6 || strcmp(argv[1], "stream"))) {
    fprintf(stderr, "usage: vmmc-bench server PORT\n"
                    "       vmmc-bench latency|stream HOST PORT BYTES SECONDS\n");
    return 2;
  }
  long size = atol(argv[4]);
  if (size < 1 || size > LARGEST) {
    fprintf(stderr, "vmmc-bench: BYTES is %s, must be 1 to %d\n", argv[4], LARGEST);
    return 2;
  }
  int fd = connect_to(argv[2], argv[3]);
  struct opening opening = {htonl(latency ? LATENCY : STREAM), htonl((uint32_t)size)};
  send_all(fd, (char *)&opening, sizeof opening);
  if (latency) measure_latency(fd, (size_t)size, atof(argv[5]));
  else measure_stream(fd, (size_t)size, atof(argv[5]));
  close(fd);
  return 0;
}
