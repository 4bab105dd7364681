/*
 * core.c: which core the NIC runs on, and when it keeps it.
 *
 * A message takes four processes by turns: program, NIC, NIC, program.  On few cores each turn needs a core, and
 * giving one away and getting it back takes longer than all that is done in the turn.  Two habits make most of it
 * happen while somebody else works:
 *
 * - Where a program has answered at once, several times, what it was given, the NIC keeps its core for the time
 *   of an answer, looking, instead of giving way: the answer finds it awake.  It does so only beside a program that
 *   runs on another core; on its own core the program could not answer meanwhile.
 * - So a NIC that finds itself on the core of the program that it plays with leaves it.  Nothing is pinned: it
 *   moves once, and the scheduler does with it what it wants afterwards.
 *
 * What the NIC has passed on to a peer it does not wait for: it gives way at once (vmmc_idle.h), since the core may be
 * what the peer needs.
 */
#include <sched.h>

#include "nic.h"

enum {
  ANSWER_NS = 20000,        /* as an answer counts what comes within this time: a small request to a real server */
  BESIDE_LONG = 200,        /* turns in a row on the program's own core, until it leaves */
  STAY_NS = 20000000,       /* at least, on the core that it went to */
};

static struct {
  uint64_t since_ns; /* when a program that has not answered was given something first, 0: none */
  uint32_t cpu;      /* where that program said it ran */
  uint32_t turns;    /* answers, less gifts that had none */
  uint32_t beside;
  bool asked; /* a program has answered in this turn of the duty cycle: counted at its end, when the peer knows */
  uint64_t moved_ns;
} core;

void core_gave(struct endpoint *e) {
  core.cpu = atomic_load_explicit(&app_header(e)->cpu, memory_order_relaxed); /* a hint, whatever it says */
  if (!core.since_ns)
    core.since_ns = vmmc_now_ns();
  else if (core.turns)
    core.turns--; /* more comes than it answers: a stream */
}

static void nobody_answers(void) {
  core.since_ns = 0;
  core.asked = false;
}

void core_woke(void) { nobody_answers(); }

void core_asked(void) { core.asked = core.since_ns != 0; }

static void answered(void) {
  if (vmmc_now_ns() - core.since_ns > ANSWER_NS)
    core.turns /= 2;
  else if (core.turns < VMMC_IDLE_TURNS_MAX)
    core.turns++;
  core.since_ns = 0;
  core.asked = false;
}

void core_opened(void) {
  core.turns /= 2;
  nobody_answers();
}

/* To any other core that it may use.  A NIC that may use one only, or may not choose, stays. */
static void leave(uint32_t cpu) {
  cpu_set_t all, others;
  if (sched_getaffinity(0, sizeof all, &all) < 0) return;
  others = all;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) && sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof all, &all);
}

void core_turn(struct vmmc_idle *idle) {
  if (core.asked) answered();
  uint32_t cpu = vmmc_idle_cpu(); /* published relaxed: a hint, of which nothing else depends */
  if (atomic_load_explicit(&nic.pub->cpu, memory_order_relaxed) != cpu)
    atomic_store_explicit(&nic.pub->cpu, cpu, memory_order_relaxed);
  if (!core.since_ns || core.turns < VMMC_IDLE_TURNS_ENOUGH) return;
  if (core.cpu != cpu) {
    idle->look_until_ns = core.since_ns + ANSWER_NS;
    core.beside = 0;
  } else if (++core.beside >= BESIDE_LONG) {
    core.beside = 0;
    uint64_t now = vmmc_now_ns();
    if (now - core.moved_ns < STAY_NS) return;
    core.moved_ns = now;
    leave(cpu);
  }
}
