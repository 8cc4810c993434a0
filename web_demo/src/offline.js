/** Registers the service worker and tells when the page works without network. */

/**
 * @param used paths, relative to the page, that a start without network needs
 * @param tell called with a sentence for the page's foot
 */
export async function keepOffline(used, tell) {
  if (!("serviceWorker" in navigator)) {
    tell("Not usable offline: this browser, or this address, gives no service worker.");
    return;
  }
  try {
    await navigator.serviceWorker.register("sw.js");
    const { active } = await navigator.serviceWorker.ready;
    navigator.serviceWorker.addEventListener("message", ({ data }) => {
      if (data.kept !== undefined) tell("Ready to work offline.");
      if (data.keepFailed) tell(`Not usable offline: ${data.keepFailed}.`);
    });
    active.postMessage({ keep: used });
  } catch (error) {
    tell(`Not usable offline: ${error.message}`);
  }
}
