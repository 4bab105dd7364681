/*
 * notify.c: notifications, taken by whoever waits or by handlers.
 *
 * The NIC writes them into one ring.  Those that want them want different exports, so they are marked
 * one by one, and the position up to which the NIC may write again follows behind the marks.
 */
#include <errno.h>
#include <signal.h>

#include "vmmc_private.h"

void notify_start(struct vmmc_endpoint *v) {
  v->notifier.taken =
      atomic_load_explicit(&app_header(v->endpoint)->notifications_taken, memory_order_relaxed);
  v->notifier.running = -1;
  pthread_cond_init(&v->notifier.ran, NULL);
}

void notify_changed(struct vmmc_endpoint *v) {
  atomic_fetch_add_explicit(&v->notifier.changed, 1, memory_order_release);
  vmmc_futex_wake(&v->notifier.changed);
}

int notify_words(struct vmmc_endpoint *v, struct wait_word words[2]) {
  words[0] = (struct wait_word){&nic_header(v->endpoint)->wake_notification, &app_header(v->endpoint)->asleep_notification};
  words[1] = (struct wait_word){&v->notifier.changed, &v->notifier.asleep};
  return 2;
}

static uint64_t written(const struct vmmc_endpoint *v) {
  /* acquire: the notification, and the data that it speaks of, come before the position */
  return atomic_load_explicit(&nic_header(v->endpoint)->notifications, memory_order_acquire);
}

static const struct vmmc_notification *notification_at(const struct vmmc_endpoint *v, uint64_t position) {
  const struct vmmc_notification *ring = (const void *)(v->endpoint->nic + VMMC_NIC_NOTIFICATIONS);
  return &ring[position % VMMC_NOTIFICATIONS];
}

/* Lets the NIC have the room of those at the ring's end that were taken. */
static void room_give(struct vmmc_endpoint *v) {
  struct notifier *n = &v->notifier;
  uint64_t end = written(v), before = n->taken;
  while (n->taken != end && n->done[n->taken % VMMC_NOTIFICATIONS]) {
    n->done[n->taken % VMMC_NOTIFICATIONS] = false;
    n->taken++;
  }
  if (n->taken == before) return;
  /* release: the NIC writes there again only after we have read it */
  atomic_store_explicit(&app_header(v->endpoint)->notifications_taken, n->taken, memory_order_release);
}

/* Whom a notification is for. */
enum taker { FOR_EXPORT, FOR_HANDLERS, FOR_OTHERS };

static bool take(struct vmmc_endpoint *v, enum taker taker, int export_id, struct vmmc_notice *notice) {
  struct notifier *n = &v->notifier;
  for (uint64_t at = n->taken, end = written(v); at != end; at++) {
    if (n->done[at % VMMC_NOTIFICATIONS]) continue;
    const struct vmmc_notification *from = notification_at(v, at);
    struct exported *x = export_find(v, (int)from->export_id);
    bool handled = x && x->handler;
    if (taker == FOR_EXPORT ? (int)from->export_id != export_id : handled != (taker == FOR_HANDLERS))
      continue;
    *notice = (struct vmmc_notice){
        .export_id = (int32_t)from->export_id,
        .node = from->node,
        .sender = from->sender,
        .tag = from->tag,
        .offset = from->offset,
        .length = from->length,
    };
    n->done[at % VMMC_NOTIFICATIONS] = true;
    room_give(v);
    return true;
  }
  return false;
}

void notify_drop(struct vmmc_endpoint *v, uint32_t export_id) {
  struct vmmc_notice dropped;
  while (take(v, FOR_EXPORT, (int)export_id, &dropped)) continue;
}

/* ---- waiting ---- */

struct taking {
  struct vmmc_endpoint *v;
  enum taker taker;
  int export_id;
  bool gone; /* the export is none any more */
  struct vmmc_notice notice;
};

static bool taking_is_over(void *context) {
  struct taking *t = context;
  pthread_mutex_lock(&t->v->lock);
  t->gone = t->taker == FOR_EXPORT && !export_find(t->v, t->export_id);
  bool taken = !t->gone && take(t->v, t->taker, t->export_id, &t->notice);
  pthread_mutex_unlock(&t->v->lock);
  return taken || t->gone;
}

int vmmc_notification(struct vmmc_endpoint *v, int export_id, struct vmmc_notice *notice, int timeout_ms) {
  if (!call_begin(v)) return -1;
  if (!notice) return fail(EINVAL);
  struct taking t = {
      .v = v, .taker = export_id == VMMC_EVERY ? FOR_OTHERS : FOR_EXPORT, .export_id = export_id};
  struct wait_word words[2];
  int error = call_wait(v, words, notify_words(v, words), taking_is_over, &t, timeout_ms);
  if (!error && t.gone) error = EINVAL;
  if (error) return fail(error);
  *notice = t.notice;
  return 0;
}

/* ---- handlers ---- */

static void *run_handlers(void *context) {
  struct vmmc_endpoint *v = context;
  struct notifier *n = &v->notifier;
  struct taking t = {.v = v, .taker = FOR_HANDLERS};
  struct wait_word words[2];
  for (;;) {
    int error = call_wait(v, words, notify_words(v, words), taking_is_over, &t, -1);
    if (error == EINTR) continue;
    if (error) return NULL; /* the endpoint has ended */
    pthread_mutex_lock(&v->lock);
    /* It may have been taken away since; then the notification is nobody's any more. */
    struct exported *x = export_find(v, t.notice.export_id);
    vmmc_handler *handler = x ? x->handler : NULL;
    void *of_handler = x ? x->context : NULL;
    n->running = handler ? t.notice.export_id : -1;
    pthread_mutex_unlock(&v->lock);
    if (!handler) continue;
    handler(&t.notice, of_handler);
    pthread_mutex_lock(&v->lock);
    n->running = -1;
    pthread_cond_broadcast(&n->ran);
    pthread_mutex_unlock(&v->lock);
  }
}

/* Starts the thread when there is none; the lock is held.  0 or an errno. */
static int thread_start(struct vmmc_endpoint *v) {
  if (v->notifier.started) return 0;
  /* The program's signals are for its own threads. */
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  int error = pthread_create(&v->notifier.thread, NULL, run_handlers, v);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  v->notifier.started = !error;
  return error;
}

int vmmc_on_notification(struct vmmc_endpoint *v, int export_id, vmmc_handler *handler, void *context) {
  if (!call_begin(v)) return -1;
  struct notifier *n = &v->notifier;
  pthread_mutex_lock(&v->lock);
  struct exported *x = export_find(v, export_id);
  int error = !x ? EINVAL : handler ? thread_start(v) : 0;
  if (!error) {
    x->handler = handler;
    x->context = context;
    bool own = n->started && pthread_equal(pthread_self(), n->thread);
    while (!handler && !own && n->running == export_id) pthread_cond_wait(&n->ran, &v->lock);
  }
  pthread_mutex_unlock(&v->lock);
  if (error) return fail(error);
  notify_changed(v);
  return 0;
}

int notify_stop(struct vmmc_endpoint *v) {
  if (!v->notifier.started) return 0;
  return pthread_join(v->notifier.thread, NULL);
}
