/*
 * exchange: one end of a connection, which sends and receives what it is told, every byte checked.
 *
 *     exchange listen PORT
 *     exchange connect PORT HOST
 *
 * A line on stdin is an exchange, of numbers: FRESH (a new connection first), what to send (SEED BYTES CHUNK),
 * what to receive (SEED BYTES CHUNK), HEAP (into memory of the VMMC heap, where receives are redirected) and
 * PAUSES (before a receive, up to so many yields).  Both directions go on at once.  The answer is a line: "ok", or
 * what is wrong.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <vmmc.h>

enum { CHUNK_MAX = 1 << 20 };

static char *heap, *ordinary, *outgoing;
static int listener = -1, peer = -1;

static void die(const char *what) {
  fprintf(stderr, "exchange: %s: %s\n", what, strerror(errno));
  exit(1);
}

static uint64_t mix(uint64_t x) { /* splitmix64 */
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

/* The bytes of a stream: 8 at a time, alike nowhere. */
static void fill(char *to, uint64_t seed, uint64_t position, uint64_t length) {
  for (uint64_t i = 0; i < length;) {
    uint64_t at = position + i, word = mix(mix(seed) + at / 8), skip = at % 8, run = 8 - skip;
    if (run > length - i) run = length - i;
    memcpy(to + i, (char *)&word + skip, run);
    i += run;
  }
}

static int64_t first_difference(const char *found, uint64_t seed, uint64_t position, uint64_t length) {
  static char expected[CHUNK_MAX];
  fill(expected, seed, position, length);
  if (!memcmp(found, expected, length)) return -1;
  for (uint64_t i = 0;; i++)
    if (found[i] != expected[i]) return (int64_t)(position + i);
}

struct direction {
  uint64_t seed, bytes, chunk;
};

static void *send_all(void *argument) {
  const struct direction *d = argument;
  for (uint64_t at = 0; at < d->bytes;) {
    uint64_t length = d->bytes - at < d->chunk ? d->bytes - at : d->chunk;
    fill(outgoing, d->seed, at, length);
    for (uint64_t done = 0; done < length;) {
      ssize_t n = send(peer, outgoing + done, length - done, MSG_NOSIGNAL);
      if (n < 0) die("send");
      done += (uint64_t)n;
    }
    at += length;
  }
  return NULL;
}

static void receive_all(const struct direction *d, bool redirected, unsigned pauses) {
  char *memory = redirected ? heap : ordinary;
  uint64_t random = d->seed;
  for (uint64_t at = 0; at < d->bytes;) {
    uint64_t length = d->bytes - at < d->chunk ? d->bytes - at : d->chunk;
    for (unsigned i = pauses ? (unsigned)((random = mix(random)) % pauses) : 0; i; i--) sched_yield();
    memset(memory, 0xee, length);
    ssize_t n = recv(peer, memory, length, redirected ? MSG_WAITALL : 0);
    if (n <= 0) die(n ? "recv" : "the stream ended early");
    int64_t wrong = first_difference(memory, d->seed, at, (uint64_t)n);
    if (wrong >= 0) {
      printf("byte %lld differs\n", (long long)wrong);
      exit(1);
    }
    at += (uint64_t)n;
  }
}

static void renew(const char *host, int port) {
  if (peer >= 0) close(peer);
  if (!host) {
    peer = accept(listener, NULL, NULL);
    if (peer < 0) die("accept");
    return;
  }
  struct addrinfo hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM }, *found;
  char text[16];
  snprintf(text, sizeof text, "%d", port);
  if (getaddrinfo(host, text, &hints, &found)) die(host);
  peer = socket(AF_INET, SOCK_STREAM, 0);
  if (peer < 0 || connect(peer, found->ai_addr, found->ai_addrlen)) die("connect");
  freeaddrinfo(found);
}

int main(int count, char **arguments) {
  if (count < 3) return 2;
  int port = atoi(arguments[2]);
  const char *host = count > 3 ? arguments[3] : NULL;
  struct vmmc_endpoint *here = vmmc_attach(NULL, VMMC_HERE);
  if (!here) die("attach");
  heap = vmmc_alloc(here, CHUNK_MAX);
  ordinary = malloc(CHUNK_MAX);
  outgoing = malloc(CHUNK_MAX);
  if (!heap || !ordinary || !outgoing) die("memory");
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (!host) {
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
    int one = 1;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (listener < 0 || bind(listener, (void *)&address, sizeof address) || listen(listener, 4)) die("listen");
  }
  puts("ready");
  unsigned fresh, redirected, pauses;
  struct direction there, back;
  while (scanf("%u %lu %lu %lu %lu %lu %lu %u %u", &fresh, &there.seed, &there.bytes, &there.chunk, &back.seed,
               &back.bytes, &back.chunk, &redirected, &pauses) == 9) {
    if (fresh || peer < 0) renew(host, port);
    pthread_t sender;
    if (pthread_create(&sender, NULL, send_all, &there)) die("thread");
    receive_all(&back, redirected, pauses);
    pthread_join(sender, NULL);
    puts("ok");
  }
  return 0;
}
