/*
 * main.c: the NIC's life: arguments, the node's segments, and the duty cycle.
 *
 *     vmmc-nic --cluster NAME --uid UID --node I --nodes N --control FD [--boot N]
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#include "nic.h"

struct nic nic = { .control_fd = -1, .boot = 1 };

static volatile sig_atomic_t stop;

static void on_stop(int signal_number) {
  (void)signal_number;
  stop = 1;
  sleep_not();
}

static void usage(const char *problem) {
  fprintf(stderr, "vmmc-nic: %s\nusage: vmmc-nic --cluster NAME --uid UID --node I --nodes N --control FD [--boot N]\n", problem);
  exit(2);
}

static uint32_t number(const char *option, const char *text, uint32_t maximum) {
  char *end;
  unsigned long value = strtoul(text, &end, 10);
  if (!*text || *end || value > maximum) {
    char problem[160];
    snprintf(problem, sizeof problem, "%s takes a number up to %u, not '%s'", option, maximum, text);
    usage(problem);
  }
  return (uint32_t)value;
}

static int parse(int count, char **argument) {
  int control = -1;
  bool node = false;
  for (int i = 1; i < count; i += 2) {
    const char *option = argument[i], *value = i + 1 < count ? argument[i + 1] : "";
    if (!strcmp(option, "--cluster")) {
      if (!*value || strlen(value) > VMMC_NAME_MAX) usage("--cluster takes a name of 1 to 32 characters");
      snprintf(nic.cluster, sizeof nic.cluster, "%s", value);
    } else if (!strcmp(option, "--uid")) {
      nic.uid = number(option, value, UINT32_MAX);
    } else if (!strcmp(option, "--node")) {
      nic.node = number(option, value, VMMC_NODES_MAX - 1);
      node = true;
    } else if (!strcmp(option, "--nodes")) {
      nic.nodes = number(option, value, VMMC_NODES_MAX);
    } else if (!strcmp(option, "--boot")) {
      nic.boot = number(option, value, UINT32_MAX);
    } else if (!strcmp(option, "--control")) {
      control = (int)number(option, value, INT32_MAX);
    } else {
      usage("an option that it does not have");
    }
  }
  if (!*nic.cluster || !node || nic.node >= nic.nodes || control < 0) usage("an option is missing");
  return control;
}

static void *map_own(const char *what, uint64_t bytes, uint64_t committed, int *fd_out) {
  int fd;
  void *base = segment_map(nic.node, what, bytes, true, &fd);
  if (!base) {
    log_event("error", "cannot map segment %s: %s", what, strerror(errno));
    if (errno == ENOENT || errno == EPROTO) nic_end_damaged(what);
    exit(1);
  }
  if (!segment_commit(fd, 0, committed)) exit(1);
  if (fd_out)
    *fd_out = fd;
  else
    close(fd);
  return base;
}

static void take_over(void) {
  nic.door = map_own("door", sizeof *nic.door, sizeof *nic.door, NULL);
  nic.state = map_own("state", STATE_BYTES, offsetof(struct node_state, binding),
                      &nic.state_fd);
  /* What each wire that leads here is like is looked at when its link is made: there must be pages then. */
  if (!segment_commit(nic.state_fd, offsetof(struct node_state, wire), nic.nodes * sizeof *nic.state->wire)) exit(1);
  /* One NIC a node, whatever a daemon that was killed may have started.  It is held until this process ends,
   * or closes any descriptor of the segment; who asks for it is told our pid. */
  struct flock whole = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
  if (fcntl(nic.state_fd, F_SETLK, &whole) < 0) {
    log_event("error", "another NIC serves this node: %s", strerror(errno));
    exit(1);
  }
  /* After the lock: who removes the segment looks for its holder after that, so that one of both finds the other. */
  struct stat s;
  if (fstat(nic.state_fd, &s) == 0 && s.st_nlink == 0) nic_end_damaged("state");
  nic.pub = map_own("pub", sizeof *nic.pub, sizeof *nic.pub, NULL);
  struct vmmc_pub *pub = nic.pub;
  pub->version = VMMC_LAYOUT_VERSION;
  pub->node = nic.node;
  pub->nodes = nic.nodes;
  pub->boot = nic.boot;
  atomic_store(&pub->asleep, 0);
  atomic_store(&pub->nic_pid, getpid());
  atomic_store(&pub->retiring, 0);
  /* Peers that see the new number repeat what the predecessor may have left unanswered. */
  atomic_fetch_add(&pub->incarnation, 1);
  pub->magic = VMMC_MAGIC;
  if (atomic_load(&pub->incarnation) == 1) return;
  /* Endpoints before links: a packet for one that is not there yet would be answered with a reset. */
  endpoints_recover();
  links_recover();
}

void nic_end_for_memory(const char *what) {
  log_end();
  log_event("error", "out of memory for %s: ending, for a successor to go on", what);
  exit(1);
}

void nic_end_damaged(const char *what) {
  log_end();
  log_event("error", "shared memory of this node was removed or truncated (%s): it must be started anew", what);
  exit(VMMC_EXIT_DAMAGED);
}

static bool have_work(void) {
  return stop || control_has_work() || log_has_work() || endpoints_have_work() || links_have_work();
}

void nic_start(int count, char **argument) {
  int control = parse(count, argument);
  fcntl(control, F_SETFD, FD_CLOEXEC);
  char title[16];
  snprintf(title, sizeof title, "vmmc-nic%u", nic.node);
  prctl(PR_SET_NAME, title);
  prctl(PR_SET_TIMERSLACK, 1); /* ns: what is due at a time comes at that time */
  signal(SIGPIPE, SIG_IGN);
  signal(SIGINT, SIG_IGN); /* Ctrl-C is for programs, not for the cluster */
  struct sigaction action = { .sa_handler = on_stop };
  sigaction(SIGTERM, &action, NULL);
  dma_start();
  if (!wake_start()) {
    log_event("error", "no timer: %s", strerror(errno));
    exit(1);
  }
  crash_start();
  take_over();
  control_start(control);
  log_event("info", "serving %s, pid %d, incarnation %u", nic.cluster, getpid(), atomic_load(&nic.pub->incarnation));
  control_say(VMMC_CONTROL_READY, 0, 0, getpid());
}

int nic_turn(void) {
  int done = 0;
  done += links_receive(); /* first: who waits for what comes this way has waited for a core, or two, already */
  done += endpoints_work();
  done += control_work();
  done += log_work();
  if (nic.unreliable_links) done += unreliable_links_work();
  done += keepalive_work();
  done += links_transmit();
  done += give_back_work();
  /* release: what this turn did, before it is over */
  atomic_store_explicit(&nic.pub->turns, atomic_load_explicit(&nic.pub->turns, memory_order_relaxed) + 1, memory_order_release);
  return done;
}

int main(int count, char **argument) {
  nic_start(count, argument);
  struct vmmc_idle idle = { 0 };
  while (!stop) {
    if (nic_turn()) {
      vmmc_idle_begin(&idle);
      core_turn(&idle);
    } else if (nic.unreliable_links && unreliable_links_due() < vmmc_now_ns() + VMMC_IDLE_LOOK_NS) {
      vmmc_idle_pause(); /* a yield would come back later than that */
    } else if (!vmmc_idle_poll(&idle)) {
      uint64_t due_ns = unreliable_links_due(), alive_ns = keepalive_due(), missed_ns = links_due();
      if (alive_ns < due_ns) due_ns = alive_ns;
      sleep_until_work(have_work, missed_ns < due_ns ? missed_ns : due_ns);
      vmmc_idle_woken(&idle);
    }
  }
  log_end();
  log_event("info", "ending");
  return 0;
}
