/*
 * redirect.c: redirection of an exported buffer, by the protocol that stands in vmmc_layout.h.
 */
#include <errno.h>
#include <sched.h>
#include <time.h>

#include "vmmc_private.h"

/* Where bytes went so far: nothing but the newest redirection is asked for, so its run stands still
 * from behind: `from` is fixed once `redirected_post` names it. */
static struct vmmc_redirected redirect_look(const struct vmmc_endpoint *v, uint32_t export_id) {
  const struct exported *x = &v->exported[export_id];
  const struct vmmc_nic_export *nic = nic_export(v, export_id);
  /* acquire: the NIC stores the bounds first and the generation that they belong to last */
  if (atomic_load_explicit(&nic->redirected_post, memory_order_acquire) != x->post)
    return (struct vmmc_redirected){x->redirect_position, x->redirect_position};
  return (struct vmmc_redirected){
      .from = atomic_load_explicit(&nic->redirected_from, memory_order_relaxed),
      /* acquire: the bytes before it are in place */
      .to = atomic_load_explicit(&nic->redirected_to, memory_order_acquire),
  };
}

/* The NIC holds its claim for the length of one copy; when it was killed in it, until a successor came. */
static void claim_wait(const struct vmmc_nic_export *nic, uint64_t generation) {
  struct timespec pause = {.tv_nsec = 20000};
  for (int look = 0; atomic_load(&nic->claim) == generation; look++) {
    if (look < 1000) {
      sched_yield();
    } else {
      nanosleep(&pause, NULL);
      if (pause.tv_nsec < 5000000) pause.tv_nsec *= 2;
    }
  }
}

struct vmmc_redirected redirect_withdraw(struct vmmc_endpoint *v, uint32_t export_id) {
  struct exported *x = &v->exported[export_id];
  /* seq_cst, as the load of the claim: the NIC stores its claim and then looks at `post` again, so one
   * of the two sees the other. */
  atomic_store(&app_export(v, export_id)->post, 0);
  claim_wait(nic_export(v, export_id), x->post);
  struct vmmc_redirected redirected = redirect_look(v, export_id);
  if (redirected.to < x->redirect_position + x->redirect_length) COUNT_APP(v, redirections_cancelled, 1);
  utlb_release(v, x->redirect_offset, x->redirect_length);
  x->post = 0;
  notify_changed(v); /* whoever waits for it to be full */
  return redirected;
}

int vmmc_redirect(struct vmmc_endpoint *v, int export_id, uint64_t offset, uint64_t length,
                  void *destination) {
  if (!call_begin(v)) return -1;
  pthread_mutex_lock(&v->lock);
  struct exported *x = export_find(v, export_id);
  uint64_t to = 0;
  int error = 0;
  if (!x || !length || offset > x->length || length > x->length - offset)
    error = EINVAL;
  else if (x->post)
    error = EBUSY;
  else if (!heap_offset(v, destination, length, &to))
    error = EFAULT;
  else
    error = utlb_hold_all(v, to, length);
  if (!error) {
    x->post = ++v->posts;
    x->redirect_offset = to;
    x->redirect_length = length;
    x->redirect_position = offset;
    struct vmmc_app_export *app = app_export(v, (uint32_t)export_id);
    app->redirect_offset = to;
    app->redirect_length = length;
    app->redirect_position = offset;
    /* release: the NIC that sees the generation sees what it stands for */
    atomic_store_explicit(&app->post, x->post, memory_order_release);
    COUNT_APP(v, redirections_posted, 1);
  }
  pthread_mutex_unlock(&v->lock);
  return error ? fail(error) : 0;
}

int vmmc_redirect_end(struct vmmc_endpoint *v, int export_id, struct vmmc_redirected *redirected) {
  if (!call_begin(v)) return -1;
  pthread_mutex_lock(&v->lock);
  struct exported *x = export_find(v, export_id);
  bool posted = x && x->post;
  struct vmmc_redirected result = {0};
  if (posted) result = redirect_withdraw(v, (uint32_t)export_id);
  pthread_mutex_unlock(&v->lock);
  if (!posted) return fail(EINVAL);
  if (redirected) *redirected = result;
  return 0;
}

struct filling {
  struct vmmc_endpoint *v;
  int export_id;
  uint64_t upto;
  bool posted;
  struct vmmc_redirected redirected;
};

static bool filling_is_over(void *context) {
  struct filling *f = context;
  pthread_mutex_lock(&f->v->lock);
  struct exported *x = export_find(f->v, f->export_id);
  f->posted = x && x->post;
  if (f->posted) f->redirected = redirect_look(f->v, (uint32_t)f->export_id);
  pthread_mutex_unlock(&f->v->lock);
  return !f->posted || f->redirected.to >= f->upto;
}

int vmmc_redirect_wait(struct vmmc_endpoint *v, int export_id, uint64_t upto,
                       struct vmmc_redirected *redirected, int timeout_ms) {
  if (!call_begin(v)) return -1;
  struct filling f = {.v = v, .export_id = export_id, .upto = upto};
  struct wait_word words[2];
  int error = call_wait(v, words, notify_words(v, words), filling_is_over, &f, timeout_ms);
  if (!error && !f.posted) error = EINVAL;
  if (redirected && f.posted) *redirected = f.redirected;
  return error ? fail(error) : 0;
}

int vmmc_arrived(struct vmmc_endpoint *v, int export_id, struct vmmc_arrived *arrived) {
  if (!call_begin(v)) return -1;
  pthread_mutex_lock(&v->lock);
  bool known = export_find(v, export_id);
  pthread_mutex_unlock(&v->lock);
  if (!known || !arrived) return fail(EINVAL);
  const struct vmmc_nic_export *nic = nic_export(v, (uint32_t)export_id);
  /* acquire: what is counted is in place */
  arrived->sends = atomic_load_explicit(&nic->arrivals, memory_order_acquire);
  arrived->bytes = atomic_load_explicit(&nic->received, memory_order_acquire);
  return 0;
}
