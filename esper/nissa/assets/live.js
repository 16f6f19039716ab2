// Keeps the page up to date. The server draws; this puts what it sends in its place, and says whether the line is up.

const MAX_NOTES = 2000; // more than anyone scrolls through; what goes can be asked for again
const MAX_NEW = 20; // light up as they come
const AT_ONCE = 64; // elements that one frame exchanges: the page answers between two
const HIDDEN_MS = 250; // a tab that nobody sees gets no frames
const AGAIN_MS = 15000;
const link = document.getElementById('link');
const notes = document.getElementById('notes');
const earlier = document.getElementById('earlier');
const filter = document.getElementById('filter');
const news = document.getElementById('news');
const over = document.getElementById('over');

const say = (state, words) => {
  if (link.dataset.state === state) return;
  link.dataset.state = state;
  link.textContent = words;
};

// What came and is not on the page yet: of each element the newest, and all events. Asking where something is scrolled
// to makes the browser lay out the page, so that is asked of few, before anything is changed.

const parts = new Map();
const batches = [];
let due = null;

const element = html => {
  const holder = document.createElement('template');
  holder.innerHTML = html; // escaped by the server; rows of a table need a template to be parsed
  return holder.content.firstElementChild;
};

const replace = some => {
  const scrolled = new Map();
  for (const [id] of some) {
    const old = document.getElementById(id);
    if (old?.classList.contains('scroll')) scrolled.set(id, [old.scrollTop, old.scrollLeft]);
  }
  for (const [id, html] of some) {
    const old = document.getElementById(id); // looked for now: it may lie in what was just exchanged
    if (!old) continue;
    const fresh = element(html);
    const hadFocus = old === document.activeElement;
    old.replaceWith(fresh);
    const [top, left] = scrolled.get(id) ?? [0, 0];
    if (top || left) fresh.scrollTo({top, left, behavior: 'instant'});
    if (hadFocus) fresh.focus({preventScroll: true});
  }
};

const draw = () => {
  cancelAnimationFrame(due.frame);
  clearTimeout(due.timer);
  due = null;
  batches.splice(0).forEach(take);
  const some = [...parts].slice(0, AT_ONCE);
  some.forEach(([id]) => parts.delete(id));
  replace(some);
  if (parts.size) soon();
};

const soon = () => {
  due ??= {frame: requestAnimationFrame(draw), timer: setTimeout(draw, HIDDEN_MS)};
};

const put = body => {
  for (const [id, html] of Object.entries(body)) {
    parts.delete(id); // it goes to the end: a part that holds others is drawn before what came for them later
    parts.set(id, html);
  }
  soon();
};

const showEarlier = isThere => { if (earlier) earlier.hidden = !isThere; };

const take = body => {
  if (body.restart) notes.replaceChildren();
  const before = notes.firstElementChild;
  notes.insertAdjacentHTML('afterbegin', body.html);
  if (!body.restart)
    for (let item = notes.firstElementChild, n = 0; item && item !== before && n < MAX_NEW; n += 1) {
      item.classList.add('new');
      item = item.nextElementSibling;
    }
  if (body.restart) {
    notes.dataset.first = body.first;
    showEarlier(body.earlier > 0);
  }
  while (notes.childElementCount > MAX_NOTES) {
    notes.lastElementChild.remove();
    notes.dataset.first = notes.lastElementChild.id.slice('note-'.length);
    showEarlier(true);
  }
  if (body.news.length) news.textContent = body.news.join('. ');
};

const live = () => {
  say('live', 'live');
  over.hidden = true;
};

const follow = address => {
  const source = new EventSource(address);
  source.addEventListener('open', live);
  source.addEventListener('parts', event => {
    put(JSON.parse(event.data));
    document.body.dataset.parts = Number(document.body.dataset.parts || 0) + 1;
    live();
  });
  source.addEventListener('notes', event => {
    batches.push(JSON.parse(event.data));
    soon();
  });
  source.addEventListener('trouble', event => say('lost', JSON.parse(event.data).told));
  source.addEventListener('end', event => { // nobody will answer, unless the run goes on: looked for now and then
    source.close();
    const body = JSON.parse(event.data);
    say('over', body.told);
    over.innerHTML = body.html; // escaped by the server
    over.hidden = false;
    setTimeout(() => follow(address), AGAIN_MS);
  });
  source.addEventListener('error', () => {
    const isOver = link.dataset.state === 'over';
    if (!isOver)
      say('lost', `connection lost at ${new Date().toLocaleTimeString()}; trying again. This is the last picture`);
    if (source.readyState !== EventSource.CLOSED && !isOver) return; // the browser comes back by itself, with the last id
    source.close();
    setTimeout(() => follow(address), isOver ? AGAIN_MS : 3000);
  });
};

filter?.addEventListener('change', () => { notes.dataset.filter = filter.value; });

earlier?.addEventListener('click', async () => {
  earlier.disabled = true;
  try {
    const answer = await fetch(`${document.body.dataset.notes}?before=${notes.dataset.first}`);
    if (!answer.ok) throw new Error(answer.statusText);
    const body = await answer.json();
    notes.insertAdjacentHTML('beforeend', body.html);
    notes.dataset.first = body.first;
    showEarlier(body.earlier > 0);
  } catch (error) {
    say('lost', `earlier events did not come: ${error.message}`);
  } finally {
    earlier.disabled = false;
  }
});

if (document.body.dataset.stream) follow(document.body.dataset.stream);
