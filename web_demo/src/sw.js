/**
 * Offline use. The shell is kept at install; the page names what else it used.
 *
 * Files whose name holds their hash come from the cache; the page and the package are
 * asked for first, so that a newer one is seen, and taken from the cache without network.
 */
/* global __SHELL__, __VERSION__ */
const CACHE = `flowexport-${__VERSION__}`;
const SCOPE = new URL(self.registration.scope);

self.addEventListener("install", (event) => {
  event.waitUntil(keep(__SHELL__).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  event.waitUntil((async () => {
    for (const name of await caches.keys()) {
      if (name.startsWith("flowexport-") && name !== CACHE) await caches.delete(name);
    }
    await self.clients.claim();
  })());
});

self.addEventListener("message", (event) => {
  if (event.data?.keep) {
    event.waitUntil(keep(event.data.keep).then(
      (count) => event.source.postMessage({ kept: count }),
      (error) => event.source.postMessage({ keepFailed: error.message }),
    ));
  }
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== SCOPE.origin || !url.href.startsWith(SCOPE.href)) return;
  event.respondWith(isFixed(url) ? cacheFirst(request) : networkFirst(request));
});

/** Files that never change under their name: built assets, versions in the folder's name. */
function isFixed(url) {
  return url.href.startsWith(new URL("assets/", SCOPE).href);
}

async function cacheFirst(request) {
  const cache = await caches.open(CACHE);
  return (await cache.match(request.url)) ?? fetch(request);
}

async function networkFirst(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok && (await cache.match(request.url))) await cache.put(request.url, response.clone());
    return response;
  } catch (error) {
    const kept = await cache.match(request.url);
    if (kept) return kept;
    throw error;
  }
}

/** Keep files; what the browser's own cache has is not transferred again. */
async function keep(paths) {
  const cache = await caches.open(CACHE);
  let count = 0;
  for (const path of paths) {
    const url = new URL(path, SCOPE);
    if (isFixed(url) && (await cache.match(url.href))) continue;
    const response = await fetch(url.href, { cache: isFixed(url) ? "force-cache" : "no-cache" });
    if (!response.ok) throw new Error(`${url.pathname}: HTTP ${response.status}`);
    await cache.put(url.href, response);
    count += 1;
  }
  return count;
}
