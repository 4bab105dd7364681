/* Receives that end in every way, while bytes arrive: by signals, some of whose handlers leave by longjmp, by
 * timeouts, in part, after a peek.  Memory that a receive had is checked after it: nothing may come late.
 *
 *   interrupted_receive PORT BYTES SEED heap|ordinary [dies]
 *
 * Accepts one connection, reads BYTES bytes and checks each: byte p of the stream is pattern[p % PERIOD].  A receive
 * that was left by longjmp does not tell how much it read: its buffer does.  Says "ok RETURNED JUMPED" at the end.
 *
 * dies: the NIC does, meanwhile.  What it had copied and did not live to count may lie in the buffer behind what was
 * read, and comes again: so a receive that was left seems to have read more than it did, and only what the next ones
 * find tells where the stream stands. */
#include <netinet/in.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/time.h>
#include <vmmc.h>

#include "check.h"

enum { LARGEST = 70000, UNTOUCHED = 0xee, PERIOD = 262139 /* more than may come again */ };

static uint64_t seed;
static uint64_t chance(uint64_t below) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (seed >> 33) % below;
}

/* No part of it is like another: test_stream_redirection.py makes the same. */
static unsigned char pattern[PERIOD];
static void make_pattern(void) {
  uint32_t state = 1;
  for (size_t i = 0; i < PERIOD; i++) {
    state = state * 1664525u + 1013904223u;
    pattern[i] = state >> 24 & 127;
  }
}

static sigjmp_buf out;
static volatile sig_atomic_t may_leave;

static void on_alarm(int signal) {
  (void)signal;
  if (may_leave) siglongjmp(out, 1);
}

static void alarm_in(long us) {
  setitimer(ITIMER_REAL, &(struct itimerval){.it_value.tv_usec = us}, NULL);
}

static uint64_t position, returned, jumped; /* position: of the stream, as far as the receives seem to have read */
static bool nic_dies;
static bool behind[2 * LARGEST] = {true}; /* [k]: the stream may stand k bytes before `position` */
static size_t furthest = 1;               /* of those, and one more */

/* The first `got` bytes are the stream's from `begin` on; others up to `end` are, or were not touched. */
static bool is_stream_from(uint64_t begin, const unsigned char *buffer, size_t got, size_t end) {
  for (size_t i = 0; i < end; i++)
    if (buffer[i] != pattern[(begin + i) % PERIOD] && (i < got || buffer[i] != UNTOUCHED)) return false;
  return true;
}

/* Keeps what agrees with a receive's buffer of where the stream may stand. */
static void compare(const unsigned char *buffer, size_t got, size_t end) {
  size_t agree = 0;
  for (size_t k = 0; k < furthest; k++) {
    behind[k] = behind[k] && k <= position && is_stream_from(position - k, buffer, got, end);
    if (behind[k]) agree = k + 1;
  }
  if (!agree) {
    fprintf(stderr, "%zu bytes from %llu on are wrong\n", got, (unsigned long long)position);
    _exit(1);
  }
  furthest = agree;
}

/* The last receive seems to have read `got` bytes; any of the last of them may come again. */
static void may_come_again(size_t got) {
  size_t last = 0; /* the nearest that was possible without this, and one more */
  CHECK(furthest + got <= sizeof behind / sizeof *behind);
  furthest += got;
  for (size_t k = 0; k < furthest; k++) {
    if (behind[k]) last = k + 1;
    behind[k] = last && k - (last - 1) <= got;
  }
}

/* One receive; true at the end of the stream. */
static bool receive_once(int fd, unsigned char *buffer) {
  static const int choice[] = {0, MSG_WAITALL, MSG_WAITALL, MSG_PEEK, MSG_PEEK | MSG_WAITALL, MSG_DONTWAIT};
  volatile int flags = choice[chance(sizeof choice / sizeof *choice)];
  volatile size_t length = 1 + (size_t)chance(chance(2) ? LARGEST : 3000);
  volatile ssize_t n = -1;
  memset(buffer, UNTOUCHED, LARGEST);
  struct timeval limit = {.tv_usec = chance(3) ? 0 : (suseconds_t)(1 + chance(3000))};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  struct sigaction action = {.sa_handler = on_alarm, .sa_flags = chance(2) ? SA_RESTART : 0};
  sigaction(SIGALRM, &action, NULL);
  volatile bool left = false;
  volatile int error = 0;
  if (sigsetjmp(out, 1) == 0) {
    may_leave = chance(2) != 0;
    alarm_in(1 + (long)chance(chance(2) ? 60 : 1000));
    n = recv(fd, buffer, length, flags);
    error = errno;
  } else {
    left = true;
  }
  may_leave = 0;
  alarm_in(0);
  size_t got = 0;
  if (left) {
    while (got < length && buffer[got] != UNTOUCHED) got++;
    jumped++;
  } else {
    if (n < 0) CHECK(error == EINTR || error == EAGAIN);
    if (n > 0) got = (size_t)n;
    returned++;
  }
  size_t end = LARGEST;
  while (end > got && buffer[end - 1] == UNTOUCHED) end--;
  CHECK(end == got || (nic_dies && !left && end <= length));
  if (end) compare(buffer, got, end);
  if (!(flags & MSG_PEEK)) {
    position += got;
    if (left && nic_dies) may_come_again(got);
  }
  memset(buffer, UNTOUCHED, LARGEST);
  return !left && n == 0;
}

/* The same, into a stack frame that is no more when it has ended. */
__attribute__((noinline)) static bool receive_on_stack(int fd) {
  unsigned char buffer[LARGEST];
  return receive_once(fd, buffer);
}

int main(int count, char **arguments) {
  CHECK(count == 5 || count == 6);
  nic_dies = count == 6;
  make_pattern();
  uint64_t bytes = strtoull(arguments[2], NULL, 10);
  seed = strtoull(arguments[3], NULL, 10);
  bool heap = !strcmp(arguments[4], "heap");
  unsigned char *buffer[2] = {NULL, NULL};
  struct vmmc_endpoint *here = heap ? vmmc_attach(NULL, VMMC_HERE) : NULL;
  for (int i = 0; i < 2; i++) {
    CHECK(buffer[i] = heap ? vmmc_alloc(here, LARGEST) : malloc(LARGEST));
    memset(buffer[i], UNTOUCHED, LARGEST);
  }
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[1]))};
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 1) == 0);
  int fd = accept(listener, NULL, NULL);
  CHECK(fd >= 0);
  bool ended = false;
  for (int turn = 0; !ended; turn ^= 1) {
    ended = heap || chance(2) ? receive_once(fd, buffer[turn]) : receive_on_stack(fd);
    /* What the receive before the last had is as it was left: nothing came after it. */
    for (size_t i = 0; i < LARGEST; i++) CHECK(buffer[turn ^ 1][i] == UNTOUCHED);
  }
  if (position < bytes || position - bytes >= furthest || !behind[position - bytes]) {
    fprintf(stderr, "%llu bytes of %llu\n", (unsigned long long)position, (unsigned long long)bytes);
    return 1;
  }
  printf("ok %llu %llu\n", (unsigned long long)returned, (unsigned long long)jumped);
  return 0;
}
