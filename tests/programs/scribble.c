/*
 * scribble: a program that writes anything, at any time, into the memory that it shares with its NIC.
 *
 *     scribble SEED MILLISECONDS [NODE PORT]
 *
 * It uses sockets as others do (a listener, connections to itself and to NODE), and then two threads of it
 * store random values, often near those that were there, all over its own segment: positions, generations,
 * requests, doorbells, commands, translations, redirections.  It may die of that itself.
 */
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "vmmc_layout.h"

static char *segment;
static uint64_t end_ns;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next(uint64_t *state) { /* xorshift64* (Vigna, 2016) */
  *state ^= *state >> 12, *state ^= *state << 25, *state ^= *state >> 27;
  return *state * 2685821657736338717u;
}

/* This process's own segment, which the library mapped. */
static char *find_segment(void) {
  char line[512];
  FILE *maps = fopen("/proc/self/maps", "r");
  while (maps && fgets(line, sizeof line, maps))
    if (strstr(line, "rw-s") && strstr(line, "/vmmc.") && strstr(line, ".app")) {
      fclose(maps);
      return (char *)(uintptr_t)strtoull(line, NULL, 16);
    }
  return NULL;
}

static uint64_t near(uint64_t *state, uint64_t now) {
  uint64_t random = next(state);
  switch (random % 8) {
    case 0: return now + 1;
    case 1: return now - 1;
    case 2: return now + random % VMMC_RING;
    case 3: return 0;
    case 4: return random;
    case 5: return random % 64;
    case 6: return 1ull << (random >> 8) % 64;
    default: return now;
  }
}

static void ring(uint32_t slot) {
  struct vmmc_app_header *header = (void *)segment;
  _Atomic uint64_t *dirty = (_Atomic uint64_t *)(segment + VMMC_APP_DIRTY);
  atomic_fetch_or(&dirty[slot / 64], 1ull << slot % 64);
  atomic_fetch_or(&header->summary[slot / 4096], 1ull << slot / 64 % 64);
  atomic_fetch_add(&header->bell, 1);
}

static uint64_t somewhere(uint64_t *state, uint32_t *slot) {
  uint64_t random = next(state);
  *slot = (uint32_t)(random >> 16) % 12 + (random >> 8 & 1) * VMMC_ACTIVE_SLOTS;
  switch (random % 64) {
    case 0: return offsetof(struct vmmc_app_header, events_taken);
    case 1: return offsetof(struct vmmc_app_header, notifications_taken);
    case 2: return offsetof(struct vmmc_app_header, bell);
    case 3: return (random >> 32) % VMMC_APP_DIRTY;
    case 4: return VMMC_APP_DIRTY + (random >> 32) % (VMMC_DIRTY_WORDS * 8);
    case 5: return VMMC_APP_EXPORTS + (random >> 32) % (8 * sizeof(struct vmmc_app_export));
    case 6: return VMMC_APP_UTLB + (random >> 32) % 1024;
    case 7: case 8: case 9: return VMMC_APP_COMMANDS + (random >> 32) % (VMMC_COMMANDS * sizeof(struct vmmc_command));
    case 10: return offsetof(struct vmmc_app_header, group) + (random >> 32) % 128;
    default: return VMMC_APP_SLOTS + *slot * sizeof(struct vmmc_app_slot) + (random >> 32) % sizeof(struct vmmc_app_slot);
  }
}

static void *scribble(void *seed) {
  uint64_t state = (uintptr_t)seed;
  struct vmmc_app_header *header = (void *)segment;
  while (now_ns() < end_ns) {
    for (int i = 0; i < 100; i++) {
      uint32_t slot;
      _Atomic uint64_t *at = (_Atomic uint64_t *)(segment + (somewhere(&state, &slot) & ~7ull));
      atomic_store(at, near(&state, atomic_load(at)));
      ring(slot);
      /* Mostly one command more: an impossible number of them ends it all. */
      if (i % 10 == 0) atomic_fetch_add(&header->command_tail, 1);
      if (i == 0 && next(&state) % 5000 == 0) atomic_store(&header->command_tail, next(&state));
    }
  }
  return NULL;
}

static int to(const char *node, uint16_t port) {
  struct hostent *host = gethostbyname(node);
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
  int s = socket(AF_INET, SOCK_STREAM, 0);
  if (!host) return -1;
  memcpy(&address.sin_addr, host->h_addr_list[0], sizeof address.sin_addr);
  if (connect(s, (void *)&address, sizeof address)) return -1;
  return s;
}

int main(int count, char **argument) {
  if (count < 3) return 2;
  char byte = 0;
  uint64_t seed = strtoull(argument[1], NULL, 10) * 2 + 1;
  alarm((unsigned)atoi(argument[2]) / 1000 + 2); /* its own calls may wait for ever now */
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
  socklen_t length = sizeof address;
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 3)) return 3;
  getsockname(listener, (void *)&address, &length);
  for (int i = 0; i < 3; i++) {
    int s = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(s, (void *)&address, sizeof address) || write(s, &byte, 1) != 1) return 4;
    if (i && accept(listener, NULL, NULL) < 0) return 5;
  }
  for (int i = 0; count == 5 && i < 3; i++) to(argument[3], (uint16_t)atoi(argument[4]));
  segment = find_segment();
  if (!segment) return 6;
  puts("scribbling");
  fflush(stdout);
  end_ns = now_ns() + strtoull(argument[2], NULL, 10) * 1000000u;
  pthread_t thread;
  pthread_create(&thread, NULL, scribble, (void *)(uintptr_t)(seed * 77));
  scribble((void *)(uintptr_t)seed);
  _exit(0);
}
