import { DESKTOP, PHONE, findings, launch, notices, open, selfTest } from "./harness.mjs";
const browser = await launch("/usr/bin/chromium");
const url = process.argv[2];
const { page, log } = await open(browser, url);
try { console.log(await selfTest(page, 60000)); } catch (e) { console.log(e.message); }
console.log(await page.evaluate(() => JSON.stringify(document.body.dataset)));
console.log(JSON.stringify(await findings(page), null, 0));
console.log(await notices(page));
console.log(JSON.stringify(log, null, 1));
await page.waitForTimeout(1500);
console.log(await page.textContent("#offline"));
for (const tab of ["draw", "listen", "measure"]) {
  await page.click(`#tab-${tab}`);
  await page.waitForTimeout(300);
  await page.screenshot({ path: `/tmp/w2/desk-${tab}.png`, fullPage: true });
}
await browser.close();
