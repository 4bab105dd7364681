/*
 * VMMC from C: two processes put 8 bytes into each other's memory in turn, each put with a notification.
 *
 *   native=$(python3 -c "from vmmc_emu import paths; print(paths.native_directory())")
 *   export PKG_CONFIG_PATH=$native/pkgconfig
 *   cc -o ping_pong vmmc_ping_pong.c $(pkg-config --cflags --libs vmmc)
 *   vmmc-emu up --nodes 2
 *   vmmc-emu run --node 0,1 -- ./ping_pong
 *   vmmc-emu down
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <vmmc.h>

enum { ROUNDS = 10000, TIMEOUT_MS = 10000 };

static void die(const char *what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(1);
}

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* The other process may not have exported its buffer yet. */
static struct vmmc_import import_inbox(struct vmmc_endpoint *here, uint32_t node) {
  struct vmmc_import import;
  const struct timespec pause = {.tv_nsec = 10000000};
  for (int tries = 0; vmmc_import(here, node, "inbox", &import, TIMEOUT_MS); tries++) {
    if (errno != ENOENT || tries == 1000) die("import");
    nanosleep(&pause, NULL);
  }
  return import;
}

/* Waits for the notification, and sees that it is the right ball. */
static void await_ball(struct vmmc_endpoint *here, int export, const uint64_t *inbox, uint64_t round) {
  struct vmmc_notice notice;
  if (vmmc_notification(here, export, &notice, TIMEOUT_MS)) die("notification");
  if (*inbox == round) return;
  fprintf(stderr, "round %llu brought ball %llu\n", (unsigned long long)round, (unsigned long long)*inbox);
  exit(1);
}

int main(void) {
  struct vmmc_endpoint *here = vmmc_attach(NULL, VMMC_HERE);
  if (!here) die("attach");
  uint32_t me = vmmc_node(here), other = 1 - me;

  uint64_t *inbox = vmmc_alloc(here, sizeof *inbox);
  uint64_t *outbox = vmmc_alloc(here, sizeof *outbox);
  if (!inbox || !outbox) die("alloc");
  int export = vmmc_export(here, inbox, sizeof *inbox, "inbox", VMMC_WRITE, (int)other);
  if (export < 0) die("export");
  struct vmmc_import there = import_inbox(here, other);

  double start = now_us();
  for (uint64_t round = 1; round <= ROUNDS; round++) {
    if (me == 1) await_ball(here, export, inbox, round);
    *outbox = round;
    if (vmmc_send(here, there.id, outbox, sizeof *outbox, 0, VMMC_NOTIFY, 0, TIMEOUT_MS)) die("send");
    if (me == 0) await_ball(here, export, inbox, round);
  }
  if (me == 0) printf("%d rounds, %.1f us one way\n", ROUNDS, (now_us() - start) / ROUNDS / 2);
  vmmc_detach(here);
  return 0;
}
